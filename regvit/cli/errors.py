"""Errors about what was handed in: which ones these are, and how the command line says them."""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable

import typer

from regvit.pipeline.command import is_for_the_user


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
            of_the_disk = isinstance(error, OSError) and not isinstance(error, BrokenPipeError)
            if not of_the_disk and not is_for_the_user(error):
                raise
            print(f"regvit {command.__name__}: {in_words(error)}", file=sys.stderr)
            code = 2
        raise typer.Exit(code)

    return run


def in_words(error: Exception) -> str:
    """What an error says; of one of the disk the file first, without its number; of an image without the cure that a data
    set has."""
    if type(error).__name__ == "UnreadableImage":  # named, not imported: this file does without torch
        return f"{error.path} cannot be read as an image: {error.reason}"
    if isinstance(error, OSError) and error.strerror and error.filename is not None:
        return f"{error.filename} cannot be used: {error.strerror}"
    return str(error)
