"""`convoy tune` as a script, for schedulers: python jobs/tune.py --config jobs/configs/tune.NAME.yaml"""

import sys

from convoy.cli.main import main

if __name__ == "__main__":
    main(["tune", *sys.argv[1:]])
