"""`make repro` after the environment: checked parameters, `dvc repro`, the time of each stage, and the comparison table.

Arguments go to `dvc repro`. The exit code is that of `dvc repro` if it failed, 130 after Ctrl-C, else 1 if params.yaml has a
fault or a self-check failed. Parameters come first, as DVC makes commands of the names in params.yaml, and a shell runs them.
"""

import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from regvit.pipeline.params import ParamsError, check_params

STARTS = re.compile(r"Running stage '(.+)':")
RESTORED = re.compile(r"Stage '(.+)' is cached")
ENDS = re.compile(r"Updating lock file|Use `dvc push`|To track the changes|Data and pipelines are up to date")


def follow(lines: Iterable[str], clock=time.monotonic) -> tuple[list[tuple[str, float]], list[str]]:
    """Relays what `dvc repro` says, and times the stages.

    Args:
        lines: standard output as it comes.
        clock: seconds.
    Returns: name and seconds of each stage that ran, in order; names of those restored from the run cache.
    """
    ran, restored, running = [], [], None
    for line in lines:
        starts, again = STARTS.search(line), RESTORED.search(line)
        if running and (starts or again or ENDS.search(line)):
            ran.append((running[0], clock() - running[1]))
            running = None
        if starts:
            running = (starts[1], clock())
        elif again:
            restored.append(again[1])
        if line.strip() and " didn't change, skipping" not in line:
            print(line, end="", flush=True)
    if running:
        ran.append((running[0], clock() - running[1]))
    return ran, restored


def times(ran: list[tuple[str, float]], restored: list[str], total: float) -> str:
    """What ran and for how long, or that nothing had to."""
    if not ran and not restored:
        return f"nothing reran: everything is up to date ({total:.1f} s)"
    width = max((len(name) for name, _ in ran), default=0)
    lines = [f"{name:<{width}}  {seconds:6.1f} s" for name, seconds in ran]
    lines.append(f"{len(ran)} stages ran, {len(restored)} restored from the cache: {total:.1f} s")
    return "\n".join(lines)


def main(*arguments: str) -> int:
    try:
        check_params()
    except (ParamsError, OSError) as error:
        sys.exit(f"make repro: {error}")
    with _told_of_interrupts() as told:
        code = _reproduce(arguments, told)
    if told and code:
        print("make repro: interrupted; stages that were done are kept: run the same again", file=sys.stderr)
        return 130  # 128 + SIGINT, as shells do
    return code


@contextmanager
def _told_of_interrupts() -> Iterator[list[int]]:
    """Ctrl-C ends DVC, its stage and the table, which get it too, but not this process, which waits for them to end.

    Returns: the signals that came.
    """
    told = []
    before = signal.signal(signal.SIGINT, lambda number, _: told.append(number))
    try:
        yield told
    finally:
        signal.signal(signal.SIGINT, before)


def _reproduce(arguments: Sequence[str], told: Sequence[int]) -> int:
    start = time.monotonic()
    dvc = [sys.executable, "-m", "dvc", "repro", *arguments]
    with subprocess.Popen(dvc, stdout=subprocess.PIPE, text=True) as process:
        ran, restored = follow(process.stdout)
    if process.returncode and (told or not (ran or restored)):  # DVC has said why nothing could run
        return process.returncode
    print("\n" + times(ran, restored, time.monotonic() - start), flush=True)
    if process.returncode:
        return process.returncode
    print(flush=True)
    return subprocess.call([sys.executable, str(Path(__file__).with_name("compare.py"))])


if __name__ == "__main__":
    try:
        sys.exit(main(*sys.argv[1:]))
    except KeyboardInterrupt:  # while parameters are checked
        sys.exit(130)
