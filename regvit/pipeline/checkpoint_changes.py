"""Checkpoints of the user's that changed since their backbone was made of them: DVC does not see files outside its outs.

A digest takes seconds a gigabyte, so it is taken anew only where a file's size or time changed; what it was is kept in
work/checkpoints.json.
"""

import json
from collections.abc import Iterator
from pathlib import Path

from regvit.files import write_json
from regvit.models.backbone_file import read_description
from regvit.models.checkpoint_files import WeightsError, checkpoint_files, files_sha256
from regvit.pipeline.schema import Params

KEPT = Path("work/checkpoints.json")


def changed_checkpoints(params: Params) -> Iterator[str]:
    """Names of the backbones whose `file:` is no longer the one that their stage read; missing files are left alone."""
    known = json.loads(KEPT.read_text(encoding="utf-8")) if KEPT.is_file() else {}
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
            KEPT.parent.mkdir(exist_ok=True)
            write_json(KEPT, known)
        if known[path]["sha256"] not in read_description(folder)["source"]:
            yield name
