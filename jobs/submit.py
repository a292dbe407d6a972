"""`convoy submit` as a script: python jobs/submit.py VERB --config jobs/configs/VERB.NAME.yaml --address http://HOST:8265"""

import sys

from convoy.cli.main import main

if __name__ == "__main__":
    main(["submit", *sys.argv[1:]])
