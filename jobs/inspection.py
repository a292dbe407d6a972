"""`convoy inspect` as a script: python jobs/inspection.py BUNDLE --dataset NAME

Not inspect.py: the folder of a script comes first in Python's path, and the standard library has an `inspect`.
"""

import sys

from convoy.cli.main import main

if __name__ == "__main__":
    main(["inspect", *sys.argv[1:]])
