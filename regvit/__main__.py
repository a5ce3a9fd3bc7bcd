"""`python -m regvit`: the same as the command `regvit`."""

import sys
from importlib.util import find_spec


def main() -> int:
    """Runs the command line; says what to install where only the library is."""
    if find_spec("typer") is None:
        print("regvit: the commands need more than the library; say pip install 'regvit[pipeline]'", file=sys.stderr)
        return 2
    from regvit.cli import main as run  # why here and not above: it needs typer

    return run()


if __name__ == "__main__":
    sys.exit(main())
