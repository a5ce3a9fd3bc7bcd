"""Files and folders of the user's that changed since their stage read them: DVC does not see what is outside its outs.

Of a checkpoint and of a table of neurons the stage wrote down a digest. A digest of a checkpoint takes seconds a gigabyte, so
it is taken anew only where size or time changed. Of the folders and lists of data sets, sizes and times of all files are
kept, as `download` saw them. Both are in work/.
"""

import hashlib
import json
import os
import re
from collections.abc import Iterator
from pathlib import Path

from regvit.files import write_json
from regvit.models.backbone_file import read_description
from regvit.models.checkpoint_files import WeightsError, checkpoint_files, files_sha256
from regvit.pipeline.schema import Params
from regvit.registers.neurons_file import table_path

CHECKPOINTS, FOLDERS = Path("work/checkpoints.json"), Path("work/folders.json")
LOCAL = ("folder", "npy", "voc07", "voc12", "coco20k", "voc_segmentation", "ade20k", "nyu")  # sources of data sets


def changed_sources(params: Params) -> Iterator[str]:
    """Names of the stages whose source is no longer the one that they read; what is missing is left alone."""
    yield from (f"backbone@{name}" for name in _changed_checkpoints(params))
    yield from (f"{stage}@{name}" for stage, name in _changed_folders(params))
    yield from (f"compose@{name}" for name in _changed_tables(params))


def remember_folder(name: str, source: str) -> None:
    """Keeps what the folder or list of a data set holds now, for a later `changed_sources`; other sources are left alone."""
    if (seen := _seen(source)) is not None:
        _keep(FOLDERS, _kept(FOLDERS) | {f"{name} {source}": seen})


def _changed_checkpoints(params: Params) -> Iterator[str]:
    known = _kept(CHECKPOINTS)
    for name, backbone in params.backbones.items():
        kind, _, path = backbone.source.partition(":")
        folder = Path("data/backbones") / name
        if kind != "file" or not (folder / "backbone.json").is_file():
            continue
        try:
            files = checkpoint_files(path)
        except (OSError, WeightsError):
            continue
        stamps = [[str(file), file.stat().st_size, file.stat().st_mtime_ns] for file in files]
        if known.get(path, {}).get("files") != stamps:
            known[path] = {"files": stamps, "sha256": files_sha256(files)}
            _keep(CHECKPOINTS, known)
        if known[path]["sha256"] not in read_description(folder)["source"]:
            yield name


def _changed_folders(params: Params) -> Iterator[tuple[str, str]]:
    known = _kept(FOLDERS)
    for stage, entries in (("download", params.datasets), ("download_scenes", params.scenes)):
        for name, entry in entries.items():
            made = (Path("data") / name / "dataset.json").is_file()
            before = known.get(f"{name} {entry.source}")
            if made and before is not None and _seen(entry.source) not in (None, before):
                yield stage, name


def _changed_tables(params: Params) -> Iterator[str]:
    for name, run in params.runs.items():
        described, table = Path(f"features/runs/{name}.json"), table_path(run.neurons)
        if run.neurons.startswith("file:") and described.is_file() and table.is_file():
            made_of = json.loads(described.read_bytes()).get("table") or {}
            if made_of.get("sha256") not in (None, hashlib.sha256(table.read_bytes()).hexdigest()):
                yield name


def _seen(source: str) -> str | None:
    """A digest of the names, sizes and times of all files of a local source; None of others, and where it is not there."""
    kind, _, rest = source.partition(":")
    root = Path(re.sub(r"(?<=\.npy):\d+$", "", rest)).expanduser()
    if kind not in LOCAL or not root.exists():
        return None
    digest = hashlib.sha256()
    for file in _files(root) if root.is_dir() else [str(root)]:
        status = os.lstat(file)
        digest.update(os.fsencode(f"{file} {status.st_size} {status.st_mtime_ns}\n"))
    return digest.hexdigest()


def _files(folder: Path) -> Iterator[str]:
    for inner, folders, names in os.walk(folder):
        folders.sort()
        yield from (os.path.join(inner, name) for name in sorted(names))


def _kept(path: Path) -> dict:
    return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}


def _keep(path: Path, known: dict) -> None:
    path.parent.mkdir(exist_ok=True)
    write_json(path, known)
