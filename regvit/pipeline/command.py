"""How a stage meets its user: usage, and one line instead of a traceback for what can be mended from outside."""

import difflib
import sys
from collections.abc import Callable
from pathlib import Path
from types import TracebackType

from regvit.pipeline.params import ParamsError

OURS = (Path(__file__).parent, Path(__file__).parent.parent / "regvit")


def command(main: Callable[..., None], *arguments: str, interrupted: str) -> None:
    """Calls `main` with the arguments of the command line.

    An error that a line of ours raises on purpose (value, expectation, cure) and one of the disk end the stage with that
    line and status 1, Ctrl-C with status 130; every other is a fault of the program and keeps its traceback.

    Args:
        arguments: their names, for the usage.
        interrupted: what Ctrl-C leaves; `{0}`, `{1}`, … stand for the arguments.
    """
    stage = Path(sys.argv[0]).stem
    if len(sys.argv) != 1 + len(arguments):
        sys.exit(" ".join([f"usage: python stages/{stage}.py", *(f"<{name}>" for name in arguments)]))
    try:
        main(*sys.argv[1:])
    except KeyboardInterrupt:
        print(f"{stage}: interrupted; {interrupted.format(*sys.argv[1:])}: run the same again", file=sys.stderr)
        sys.exit(130)  # 128 + SIGINT, as shells do
    except OSError as error:
        sys.exit(f"{stage}: {_of_the_disk(error)}")
    except (ValueError, RuntimeError) as error:
        if not _raised_by_us(error.__traceback__):
            raise
        sys.exit(f"{stage}: {error}")


def entry_of(params: dict, block: str, name: str) -> dict:
    """One named entry of params.yaml.

    Raises:
        ParamsError: there is none of that name; the message gives the nearest one.
    """
    if name not in params[block]:
        close = difflib.get_close_matches(name, params[block], n=1)
        hint = f"did you mean {close[0]!r}?" if close else f"there are {', '.join(params[block])}"
        raise ParamsError(f"{block} of params.yaml has no {name!r}: {hint}")
    return params[block][name]


def _of_the_disk(error: OSError) -> str:
    """The error in words: with the file where the system gave one, or as our own line says it."""
    if error.strerror is None or error.filename is None:
        return str(error)
    return f"{error.filename}: {error.strerror}; mend that and run the same again"


def _raised_by_us(at: TracebackType | None) -> bool:
    """Whether the line that raised is one of stages/ or regvit/."""
    while at is not None and at.tb_next is not None:
        at = at.tb_next
    return at is not None and Path(at.tb_frame.f_code.co_filename).resolve().parent in OURS
