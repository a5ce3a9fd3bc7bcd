"""download <dataset>: one data set of params.yaml, into data/<dataset>.

Packages and archives are kept in work/, outside DVC's outputs, and shared by all data sets and queued experiments.
"""

import os
import time
from pathlib import Path

from regvit.data.sources import make_dataset
from regvit.pipeline.checks.source_changes import remember_folder
from regvit.pipeline.command import command
from regvit.pipeline.params import load_params, source_of


def main(name: str) -> None:
    params = load_params()
    began = time.monotonic()
    work = workplace()
    entry = source_of(params, name)
    if work == Path("work"):
        remember_folder(name, entry.source)  # before it is read: what changes meanwhile counts as changed
    made = make_dataset(
        entry.source,
        name,
        Path("data") / name,
        work,
        params.seed,
        **entry.model_dump(exclude={"source"}, exclude_unset=True),
    )
    print(f"{made.summary()}, {time.monotonic() - began:.1f} s")
    if notes := made.notes():
        print(notes)


def workplace() -> Path:
    """The folder work/ of the repository: relative where the stage runs in it, so that what is read in place is noted by
    a path that holds on other machines too; absolute where a queued experiment runs in a copy."""
    root = os.environ.get("DVC_ROOT", ".")
    return Path("work") if os.path.realpath(root) == os.path.realpath(".") else Path(root) / "work"


if __name__ == "__main__":
    command(main, "dataset", interrupted="data/{0} is as it was, and downloads are kept in work/")
