"""`convoy score` as a script, for schedulers: python jobs/score.py --config jobs/configs/score.NAME.yaml"""

import sys

from convoy.cli.main import main

if __name__ == "__main__":
    main(["score", *sys.argv[1:]])
