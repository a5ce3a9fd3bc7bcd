"""Errors about what was handed in: which ones these are, and how the command line says them."""

from __future__ import annotations

import functools
import sys
import traceback
from collections.abc import Callable
from pathlib import Path

import typer

LIBRARY = Path(__file__).resolve().parents[1]


class WrongInput(ValueError):
    """Something that was handed in cannot be used; the message says what and how to cure it."""


def one_message(command: Callable[..., int | None]) -> Callable[..., None]:
    """The command with its exit code: an error about what was handed in gives one message and 2, Ctrl-C 130."""

    @functools.wraps(command)
    def run(*args: object, **options: object) -> None:
        try:
            code = command(*args, **options) or 0
        except KeyboardInterrupt:
            print("\ninterrupted", file=sys.stderr)
            code = 130
        except Exception as error:
            if isinstance(error, BrokenPipeError | typer.Exit) or not is_about_the_input(error):
                raise
            print(f"regvit {command.__name__}: {in_words(error)}", file=sys.stderr)
            code = 2
        raise typer.Exit(code)

    return run


def is_about_the_input(error: Exception) -> bool:
    """Whether an error was meant for whoever gave the command: a file that cannot be opened, or what a `raise` of our
    own says. The same kind of error out of another library, or out of a call of ours, is a bug and keeps its traceback."""
    if isinstance(error, OSError):
        return True
    at = traceback.extract_tb(error.__traceback__)[-1]
    ours = LIBRARY in Path(at.filename).resolve().parents
    return ours and (at.line or "").startswith("raise ") and isinstance(error, ValueError | RuntimeError)


def in_words(error: Exception) -> str:
    """What an error says; of one of the disk the file first, without its number; of an image without the cure that a data
    set has."""
    if type(error).__name__ == "UnreadableImage":  # named, not imported: this file does without torch
        return f"{error.path} cannot be read as an image: {error.reason}"
    if isinstance(error, OSError) and error.strerror and error.filename is not None:
        return f"{error.filename} cannot be used: {error.strerror}"
    return str(error)
