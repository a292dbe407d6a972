"""`convoy evaluate` as a script, for schedulers: python jobs/evaluate.py --config jobs/configs/evaluate.NAME.yaml"""

import sys

from convoy.cli.main import main

if __name__ == "__main__":
    main(["evaluate", *sys.argv[1:]])
