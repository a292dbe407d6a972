"""`convoy cache` as a script, for schedulers: python jobs/cache.py --config jobs/configs/cache.NAME.yaml"""

import sys

from convoy.cli.main import main

if __name__ == "__main__":
    main(["cache", *sys.argv[1:]])
