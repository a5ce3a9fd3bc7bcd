"""`python -m regvit`: the same as the command `regvit`."""

import sys

from regvit.cli import main

if __name__ == "__main__":
    sys.exit(main())
