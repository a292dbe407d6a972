"""`convoy train` as a script, for schedulers: python jobs/train.py --config jobs/configs/train.NAME.yaml"""

import sys

from convoy.cli.main import main

if __name__ == "__main__":
    main(["train", *sys.argv[1:]])
