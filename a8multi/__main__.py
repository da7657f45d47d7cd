"""`python -m a8multi`: the same as the `a8multi` command."""

import sys

from a8multi.cli import main

if __name__ == "__main__":
    sys.exit(main())
