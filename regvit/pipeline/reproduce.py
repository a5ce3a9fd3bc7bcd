"""`make repro` after the environment: checked parameters, data sets whose classes meet, `dvc repro`, the comparison table.

Arguments go to `dvc repro`. The exit code is that of `dvc repro` if it failed, 130 after Ctrl-C, else 1 if params.yaml has a
fault, classes do not meet or a self-check failed. Parameters come first, as DVC makes commands of the names in params.yaml,
and a shell runs them. Classes are looked at right after `download`, before anything is computed.
"""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from ruamel.yaml import YAML

from regvit.pipeline.command import show_anything
from regvit.pipeline.params import ParamsError, check_params
from regvit.pipeline.schema import Params
from regvit.pipeline.source_changes import changed_sources


def main(*arguments: str) -> int:
    try:
        params = check_params()
    except (ParamsError, OSError) as error:
        sys.exit(f"make repro: {error}")
    if not sys.stderr.isatty():  # a log: progress bars of the stages say how far they are every ten seconds
        os.environ.setdefault("TQDM_MININTERVAL", "10")
    with _interrupts() as interrupts:
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


def downloaded(params: Params) -> bool:
    """Whether every data set lies in data/ as params.yaml now wants it, by what DVC recorded of its download."""
    if not Path("dvc.lock").is_file():
        return False
    recorded = YAML(typ="safe").load(Path("dvc.lock"))["stages"]
    for name, entry in params.datasets.items():
        made = recorded.get(f"download@{name}", {}).get("params", {}).get("params.yaml", {})
        wanted = {f"datasets.{name}": entry.model_dump(exclude_unset=True, mode="json"), "seed": params.seed}
        if made != wanted or not Path(f"data/{name}/dataset.json").is_file():
            return False
    return True


def unmet_classes(params: Params) -> Iterator[str]:
    """One sentence for each data set whose classes do not fit its role."""
    classes = {
        name: json.loads(Path(f"data/{name}/dataset.json").read_text(encoding="utf-8"))["classes"]
        for name in params.datasets
    }
    home, known = params.in_distribution, set(classes[params.in_distribution])
    if len(known) < 2:
        yield f"datasets.{home} has {len(known)} class(es), expected two or more to tell apart: name another folder of classes"
    for name, entry in params.datasets.items():
        strange = [label for label in classes[name] if label not in known]
        if entry.role == "ood" and strange:
            shown = ", ".join(map(repr, strange[:5])) + (", …" if len(strange) > 5 else "")
            yield (
                f"datasets.{name} has the role ood, but {len(strange)} of its {len(classes[name])} classes are none of {home} "
                f"({shown}): rename or take classes (classes:), make it role: anomaly, or take the set out"
            )
        elif entry.role == "ood" and len(classes[name]) < 2:
            yield (
                f"datasets.{name} has a single class; only the classes that a set has may be predicted there, so every image "
                "would be right: add classes, or make it role: anomaly"
            )
        if entry.role == "anomaly" and classes[name] and not strange:
            yield f"datasets.{name} has the role anomaly, but all its classes are of {home}: make it role: ood, or take it out"


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
        [sys.executable, "-m", "dvc", "repro", *arguments], stdout=subprocess.PIPE, text=True
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
