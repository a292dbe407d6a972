"""`convoy retrain` as a script, for schedulers: python jobs/retrain.py --config jobs/configs/retrain.NAME.yaml"""

import sys

from convoy.cli.main import main

if __name__ == "__main__":
    main(["retrain", *sys.argv[1:]])
