"""Run pytest with the arguments given, and end the process with its exit code as soon as pytest has.

Ray, DuckDB and ONNX Runtime leave threads of their own behind. While C++ takes its globals down these have crashed the
process now and then, after the summary, so that `make test` failed though every test had passed.
"""

from __future__ import annotations

import os
import sys

import pytest


def main() -> None:
    """Call pytest; no destructor of a library runs after it."""
    exit_code = pytest.main(sys.argv[1:])
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(exit_code)


if __name__ == "__main__":
    main()
