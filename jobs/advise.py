"""`convoy advise` as a script, for schedulers: python jobs/advise.py --config jobs/configs/advise.NAME.yaml"""

import sys

from convoy.cli.main import main

if __name__ == "__main__":
    main(["advise", *sys.argv[1:]])
