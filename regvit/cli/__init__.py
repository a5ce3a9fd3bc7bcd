"""The commands `regvit look`, `regvit neurons`, `regvit census` and `regvit export`, one file each, and what they share.

Exit codes: 0 done; 1 done, but some of the images could not be read; 2 something that was handed in is wrong (one
message, no traceback); 130 interrupted. What is wrong with the program shows its traceback.

The top of the house: it may import every other room. torch and timm take seconds to import, so nothing of ours but these
files is imported before a command is chosen and understood; what a command needs is imported inside its functions.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from importlib import metadata
from typing import Annotated

import typer

from regvit.cli import census, export, look, neurons
from regvit.cli.errors import one_message
from regvit.pipeline.command import show_anything

app = typer.Typer(
    help="Register tokens in vision transformers: see outlier tokens, find the neurons that make them, move these into "
    "test-time registers.",
    epilog="`regvit COMMAND --help` has examples. The whole pipeline is `make repro`, see README.md.",
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
    add_completion=False,
    no_args_is_help=True,
)
app.command(epilog=look.EXAMPLES)(one_message(look.look))
app.command(epilog=neurons.EXAMPLES)(one_message(neurons.neurons))
app.command(epilog=census.EXAMPLES)(one_message(census.census))
app.command(epilog=export.EXAMPLES)(one_message(export.export))


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one command.

    Args:
        argv: its words; those of the process when None.
    Returns: the exit code.
    """
    show_anything()
    try:
        app(args=argv, prog_name="regvit")
    except BrokenPipeError:  # whoever read our output has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except SystemExit as ended:
        return ended.code if isinstance(ended.code, int) else 0
    return 0


def _print_version(wanted: bool) -> None:
    if wanted:
        print(f"regvit {metadata.version('regvit')}")
        raise typer.Exit


@app.callback()
def _options(
    version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Print the version and end.")
    ] = False,
) -> None:
    pass
