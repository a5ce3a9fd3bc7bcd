"""`make repro` after the environment: checked parameters, data sets whose classes meet, `dvc repro`, the comparison table.

Arguments go to `dvc repro`. The exit code is that of `dvc repro` if it failed, 130 after Ctrl-C, else 1 if params.yaml has a
fault, classes do not meet or a self-check failed. Parameters come first, as DVC makes commands of the names in params.yaml,
and a shell runs them. Stages run in forks of one process that has imported torch and timm, see `warm_python`; dvc.lock is read
by a fast parser, see `quick_dvc`.
"""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager

from regvit.pipeline.checks.classes import downloaded, unmet_classes
from regvit.pipeline.checks.source_changes import changed_sources
from regvit.pipeline.command import show_anything
from regvit.pipeline.params import ParamsError, check_params
from regvit.pipeline.warm_python import warm_python


def main(*arguments: str) -> int:
    try:
        params = check_params()
    except (ParamsError, OSError) as error:
        sys.exit(f"make repro: {error}")
    if not sys.stderr.isatty():  # a log: progress bars of the stages say how far they are every ten seconds
        os.environ.setdefault("TQDM_MININTERVAL", "10")
    with warm_python() as programs, _interrupts() as interrupts:
        os.environ["PATH"] = f"{programs}{os.pathsep}{os.environ['PATH']}"
        code = 0 if arguments or downloaded(params) else _dvc_repro("download")
        if code == 0 and not arguments and (faults := list(unmet_classes(params))):
            sys.exit("make repro: the data sets' classes do not meet\n" + "\n".join(f"  - {fault}" for fault in faults))
        for stage in () if code or arguments else changed_sources(params):
            print(f"{stage}: its source is no longer the one that it was made of, so it is made again", flush=True)
            code = code or _dvc_repro("--force", "--single-item", stage)
        code = code or _dvc_repro(*arguments)
        code = code or subprocess.call([sys.executable, "-m", "regvit.pipeline.compare_runs"])
    if interrupts and code:
        print("make repro: interrupted; stages that were done are kept: run the same again", file=sys.stderr)
        return 130  # 128 + SIGINT, as shells do
    return code


@contextmanager
def _interrupts() -> Iterator[list[int]]:
    """Ctrl-C ends DVC, its stage and the table, which get it too, but not this process, which waits for them to end.

    Returns: the signals that came.
    """
    came = []
    before = signal.signal(signal.SIGINT, lambda number, _: came.append(number))
    try:
        yield came
    finally:
        signal.signal(signal.SIGINT, before)


def _dvc_repro(*arguments: str) -> int:
    """Relays what `dvc repro` says but of stages that did not change, and how long it took. Returns its exit code."""
    start, ran, said_anything = time.monotonic(), 0, False
    with subprocess.Popen(
        [sys.executable, "-m", "regvit.pipeline.quick_dvc", "repro", *arguments], stdout=subprocess.PIPE, text=True
    ) as process:
        for line in process.stdout:
            if line.strip() and " didn't change, skipping" not in line:
                ran += line.startswith("Running stage ")
                said_anything |= not line.startswith("Data and pipelines are up to date")
                print(line, end="", flush=True)
    if process.returncode == 0:
        took = f"{time.monotonic() - start:.1f} s"
        print(
            f"{ran} stages ran: {took}" if said_anything else f"nothing reran: everything is up to date ({took})",
            flush=True,
        )
    return process.returncode


if __name__ == "__main__":
    show_anything()
    try:
        sys.exit(main(*sys.argv[1:]))
    except KeyboardInterrupt:  # while parameters are checked
        sys.exit(130)
