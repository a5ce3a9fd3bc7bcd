"""The command line: `regvit look`, `regvit neurons`, `regvit export`.

Exit codes: 0 done; 1 something that was handed in is wrong (one message, no traceback); 2 the command itself is not
understood; 130 interrupted. What is wrong with the program shows its traceback.

torch and timm take seconds to import, so nothing of ours but the files cli*.py is imported before a command is chosen
and understood; what a command needs is imported inside its functions.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence

from regvit.cli import export as cli_export
from regvit.cli import look as cli_look
from regvit.cli import neurons as cli_neurons
from regvit.cli.errors import in_words, is_about_the_input


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one command.

    Args:
        argv: its words; those of the process when None.
    Returns: the exit code.
    Raises:
        SystemExit: the command is not understood (2), or help was asked for (0).
    """
    arguments = _parser().parse_args(argv)
    try:
        return arguments.run(arguments) or 0
    except KeyboardInterrupt:
        print("\ninterrupted", file=sys.stderr)
        return 130
    except BrokenPipeError:  # whoever read our output has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except Exception as error:
        if not is_about_the_input(error):
            raise
        print(f"regvit {arguments.command}: {in_words(error)}", file=sys.stderr)
        return 1


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="regvit",
        description="Register tokens in vision transformers: see outlier tokens, find the neurons that make them, move "
        "these into test-time registers.",
        epilog="`regvit COMMAND --help` has examples. The whole pipeline is `make repro`, see README.md.",
    )
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for command in (cli_look, cli_neurons, cli_export):
        command.add(commands)
    return parser
