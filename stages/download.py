"""download <dataset>: one data set of params.yaml, into data/<dataset>.

Packages and archives are kept in work/, outside DVC's outputs, and shared by all data sets and queued experiments.
"""

import os
import sys
import time
from pathlib import Path

from params import load_params, source_of
from regvit.downloads import DownloadFailed
from regvit.packages import PackageUnavailable
from regvit.sources import make_dataset


def main(name: str) -> None:
    params = load_params()
    began = time.monotonic()
    work = workplace()
    entry = source_of(params, name)
    made = make_dataset(
        entry["source"],
        name,
        Path("data") / name,
        work / "packages",
        params["seed"],
        downloads_dir=work / "downloads",
        **{key: value for key, value in entry.items() if key != "source"},
    )
    print(f"{made.summary()}, {time.monotonic() - began:.1f} s")
    if made.rejected:
        print(f"  rejected images and why: data/{name}/rejected.csv; most frequent:\n{made.reasons()}")


def workplace() -> Path:
    """The folder work/ of the repository: relative where the stage runs in it, so that what is read in place is noted by
    a path that holds on other machines too; absolute where a queued experiment runs in a copy."""
    root = os.environ.get("DVC_ROOT", ".")
    return Path("work") if os.path.realpath(root) == os.path.realpath(".") else Path(root) / "work"


if __name__ == "__main__":
    if len(sys.argv) != 2:
        sys.exit("usage: python stages/download.py <dataset>")
    try:
        main(sys.argv[1])
    except (ValueError, FileNotFoundError, PackageUnavailable, DownloadFailed) as error:
        sys.exit(f"download: {error}")
    except KeyboardInterrupt:
        print(f"download: interrupted; data/{sys.argv[1]} is as it was, and what has arrived of downloads is kept in work/: "
              "run the same again", file=sys.stderr)  # fmt: skip
        sys.exit(130)  # 128 + SIGINT, as shells do
