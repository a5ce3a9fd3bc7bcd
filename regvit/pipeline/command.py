"""How a stage meets its user: usage, and one line instead of a traceback for what can be mended from outside."""

import contextlib
import sys
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path

OURS = Path(__file__).parents[2]  # regvit/ and stages/


def show_anything() -> None:
    """Has a terminal or log that is not UTF-8 show another character for one that it lacks, instead of ending the program."""
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(
            AttributeError, OSError
        ):  # no terminal's stream, or one whose file was exchanged under it
            stream.reconfigure(errors="replace")


def command(main: Callable[..., None], *arguments: str, interrupted: str) -> None:
    """Calls `main` with the arguments of the command line.

    An error that was meant for the user and one of the disk end the stage with one line and status 1, Ctrl-C with status
    130; every other is a fault of the program and keeps its traceback.

    Args:
        arguments: their names, for the usage.
        interrupted: what Ctrl-C leaves; `{0}`, `{1}`, … stand for the arguments.
    """
    show_anything()
    stage = Path(sys.argv[0]).stem
    if len(sys.argv) != 1 + len(arguments):
        sys.exit(" ".join([f"usage: python stages/{stage}.py", *(f"<{name}>" for name in arguments)]))
    try:
        main(*sys.argv[1:])
    except KeyboardInterrupt:
        print(f"{stage}: interrupted; {interrupted.format(*sys.argv[1:])}: run the same again", file=sys.stderr)
        sys.exit(130)  # 128 + SIGINT, as shells do
    except OSError as error:
        of_the_system = error.strerror is not None and error.filename is not None
        said = f"{error.filename}: {error.strerror}; mend that and run the same again" if of_the_system else error
        sys.exit(f"{stage}: {said}")
    except Exception as error:
        if not is_for_the_user(error):
            raise
        sys.exit(f"{stage}: {error}")


@contextlib.contextmanager
def noted(what: str) -> Iterator[None]:
    """Ends the block, and not the stage, with one line where a check of ours refuses what was handed in."""
    try:
        yield
    except ValueError as error:
        if not is_for_the_user(error):
            raise
        print(f"{what} {error}")


def is_for_the_user(error: Exception) -> bool:
    """Whether an error is what a `raise` of ours says of something handed in (value, expectation, cure). The same kind of
    error out of another library, or out of a call of ours, is a bug."""
    at = traceback.extract_tb(error.__traceback__)[-1]
    ours = any(Path(at.filename).resolve().is_relative_to(OURS / folder) for folder in ("regvit", "stages"))
    return ours and (at.line or "").startswith("raise ") and isinstance(error, ValueError | RuntimeError)
