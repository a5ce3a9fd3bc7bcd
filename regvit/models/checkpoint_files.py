"""The files that a checkpoint of the user's consists of, told apart without torch."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

from regvit.data.packages import file_sha256

IN_FOLDER = ("model.safetensors.index.json", "model.safetensors", "pytorch_model.bin.index.json", "pytorch_model.bin")


class WeightsError(ValueError):
    """Weights that are missing, damaged, unsafe, or those of another model; the message gives the cure."""


def checkpoint_files(path: Path | str) -> list[Path]:
    """The file that is meant, or the shards of it.

    Args:
        path: of a file, the index of shards, or a folder as the hub's clients make it; `~` is the user's home.
    Raises:
        FileNotFoundError: there is no such file, or a shard is missing.
        WeightsError: the index is none.
    """
    path = Path(path).expanduser()
    if path.is_dir():
        known = [path / name for name in IN_FOLDER if (path / name).is_file()] or sorted(path.glob("*.safetensors"))
        if not known:
            raise FileNotFoundError(f"{path} holds no weights; expected one of {', '.join(IN_FOLDER)} in it")
        path = known[0]
    if not path.is_file():
        raise FileNotFoundError(f"{path} does not exist; give the path of a weights file, from the repository's root")
    if not path.name.endswith(".index.json"):
        return [path]
    try:
        shards = sorted(set(json.loads(path.read_text(encoding="utf-8"))["weight_map"].values()))
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise WeightsError(f"{path} is no index of shards: it has no weight_map; copy it again") from error
    files = [path.with_name(Path(name).name) for name in shards]
    if missing := [file.name for file in files if not file.is_file()]:
        raise FileNotFoundError(
            f"{path} names {len(files)} shards, of which {', '.join(missing)} is not beside it; copy all of them"
        )
    return files


def files_sha256(files: list[Path]) -> str:
    """Digest of a file, or of its shards' digests."""
    digests = [file_sha256(file) for file in files]
    return digests[0] if len(digests) == 1 else hashlib.sha256("".join(digests).encode()).hexdigest()
