"""Lets ``python -m clevrd`` do what ``clevrd`` does."""

import sys

from clevrd.cli import main

if __name__ == "__main__":
    sys.exit(main())
