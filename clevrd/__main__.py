"""Lets ``python -m clevrd`` do what ``clevrd`` does."""

import sys

from clevrd.entry import main

if __name__ == "__main__":
    sys.exit(main())
