"""Image data sets of the Hugging Face hub, read through the `datasets` library.

    hub:<owner/name>[@<revision>][:<config>][/<split>][?image=<column>&label=<column>]
    hub:<path>[:<config>][/<split>]      # a local copy (a clone of the repository); starts with / or .

Give a revision, best a commit (a slash in it is written %2F): without one, the same line may give other images next
year. The column of images is
found by its type, that of labels by its type (a class label) or by being called label; where there are several, the
error names them. With a split its images are all there is; without one, a set to train on has all of its splits, and a
set of the role ood or anomaly its held-out one (test, else val). Images are kept as published, byte for byte. A table may name files instead of holding
their bytes: only those of the copy, or of this repository in the caches, are read.
"""

import os
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import parse_qsl, quote, unquote

from regvit.data.dataset_builder import DatasetBuilder
from regvit.data.decoding import UnreadableImage, read_file
from regvit.data.hub_errors import why
from regvit.data.manifest import Row
from regvit.data.packages import DownloadFailed
from regvit.data.splits import wanted_splits

GRAMMAR = re.compile(
    r"(?P<repository>[./][^:@?]*|[\w.-]+/[\w.-]+)(@(?P<revision>[\w.%-]+))?(:(?P<config>[^/?]+))?(/(?P<split>[\w.-]+))?"
    r"(\?(?P<columns>.*))?"
)


@dataclass(frozen=True)
class HubSource:
    """A source taken apart; "" where a part is left out."""

    repository: str
    revision: str
    config: str
    split: str
    columns: Mapping[str, str]

    @classmethod
    def of(cls, rest: str) -> "HubSource":
        """
        Raises:
            ValueError: it does not follow the grammar.
        """
        match = GRAMMAR.fullmatch(rest)
        columns = dict(parse_qsl(match["columns"] or "")) if match else {}
        if not match or columns.keys() - {"image", "label"}:
            raise ValueError(f"source 'hub:{rest}' does not read hub:<owner/name>[@revision][:config][/split]"
                             "[?image=<column>&label=<column>], or hub:/path/of/a/copy[:config][/split]")  # fmt: skip
        parts = {key: unquote(match[key] or "") for key in ("repository", "revision", "config", "split")}
        if parts["repository"].startswith(("/", ".")) and not parts["config"]:  # the path takes what looks like a split
            folder, _, last = parts["repository"].rpartition("/")
            if not Path(parts["repository"]).is_dir() and Path(folder or "/").is_dir():
                parts |= {"repository": folder, "split": last}
        return cls(**parts, columns=columns)


def hub_set(builder: DatasetBuilder, rest: str) -> None:
    """A data set of the hub, or a local copy of one, its images written as published."""
    source, role = HubSource.of(rest), builder.entry.role
    splits = _load(source, builder)
    if source.split and source.split not in splits:
        raise ValueError(f"{source.repository} has no split {source.split!r}; it has {', '.join(splits)}")
    tables = {name: _columns(table, source) for name, table in splits.items() if source.split in ("", name)}
    labelled = [name for name, (_, _, labels) in tables.items() if any(labels)]
    known = labelled if labelled and role in ("id", "ood") else list(tables)  # ImageNet's test split hides its labels
    wanted = wanted_splits(source.repository, known, role)
    for name in tables.keys() - wanted.keys():
        builder.left_out[f"rows of split {name}"] += len(tables[name][2])
    rows = [
        Row(f"{name}_{i:07}", f"{name}/{i}", label, split)
        for name, split in wanted.items()
        for i, label in enumerate(tables[name][2])
    ]
    at = f" at {source.revision}" if source.revision else ""
    builder.credit_to("images", f"{source.repository}{at}", "see its page on the hub", "see its page on the hub")
    places = _places(source, builder)
    for row in builder.watched(builder.plan(rows)):
        name, _, number = row.path.rpartition("/")
        table, image, _ = tables[name]
        try:
            content = _content(table[int(number)][image], places)
        except UnreadableImage as error:
            builder.reject(row, error.reason)
        else:
            builder.put(row, content)


def _cache(builder: DatasetBuilder) -> Path:
    return Path(os.path.abspath(builder.work)) / "downloads" / "hub"


def _is_local(source: HubSource) -> bool:
    return source.repository.startswith(("/", "."))


def _places(source: HubSource, builder: DatasetBuilder) -> tuple[Path, ...]:
    """Folders that the files of a source lie in, links resolved."""
    import huggingface_hub  # see _load

    if not _is_local(source):
        kept = Path(huggingface_hub.constants.HF_HUB_CACHE) / f"datasets--{source.repository.replace('/', '--')}"
        return _cache(builder).resolve(), kept.resolve()
    copy = Path(source.repository)
    shared = (copy.parent.parent,) if copy.parent.name == "snapshots" else ()  # the hub's cache: links to blobs beside
    return tuple(folder.resolve() for folder in (copy, *shared))


def _load(source: HubSource, builder: DatasetBuilder):
    """The splits by name.

    Every revision has a cache of its own: without network `datasets` would take whichever came last.

    Raises:
        FileNotFoundError: a local copy is not there.
        DownloadFailed: the hub cannot be reached, or does not have it.
    """
    import datasets  # the library takes a second to import, and no other source needs it

    if _is_local(source) and not Path(source.repository).is_dir():
        raise FileNotFoundError(f"{source.repository}, the copy that source 'hub:{source.repository}' names, does not "
                                "exist; clone the repository there")  # fmt: skip
    try:
        return datasets.load_dataset(
            source.repository,
            source.config or None,
            revision=source.revision or None,
            cache_dir=str(_cache(builder) / quote(source.revision or "newest", safe="")),
        )
    except (OSError, ValueError, RuntimeError) as error:
        wrong = isinstance(error, ValueError)  # an unknown config, say, and the message lists those that there are
        reason = f"{error}; correct the source" if wrong else why(error)
        raise DownloadFailed(f"{source.repository} could not be had from the hub: {reason}") from error


def _columns(table, source: HubSource) -> tuple:
    """(table whose images are given as bytes, column of images, class name of each row)."""
    import datasets  # see _load

    kinds = table.features
    images = [name for name, kind in kinds.items() if isinstance(kind, datasets.Image)]
    image = _only_column(images, source.columns.get("image"), kinds, "image", "images")
    named = [name for name, kind in kinds.items() if isinstance(kind, datasets.ClassLabel)]
    plain = [name for name, kind in kinds.items() if name == "label" and isinstance(kind, datasets.Value)]
    labels = [""] * len(table)
    if named or plain or "label" in source.columns:
        label = _only_column(named or plain, source.columns.get("label"), kinds, "label", "class labels")
        kind, values = kinds[label], table[label]
        if isinstance(kind, datasets.ClassLabel):
            labels = ["" if v is None or v < 0 else kind.int2str(v) for v in values]  # -1: hidden, as in test splits
        else:
            labels = ["" if v is None else str(v) for v in values]
    return table.cast_column(image, datasets.Image(decode=False)), image, labels


def _only_column(candidates: list[str], asked: str | None, columns: Mapping, key: str, hold: str) -> str:
    """The one that is asked for, or the one candidate.

    Args:
        key, hold: what the error calls the column in a source, and what the candidates hold.
    """
    if asked is not None:
        if asked not in columns:
            raise ValueError(f"there is no column {asked!r}; there are {', '.join(columns)}")
        return asked
    if len(candidates) != 1:
        raise ValueError(f"{len(candidates) or 'no'} columns hold {hold} ({', '.join(candidates or columns)}); "
                         f"name the one to take at the end of the source: ?{key}=<column>")  # fmt: skip
    return candidates[0]


def _content(image: dict | None, places: tuple[Path, ...]) -> bytes:
    """The bytes of an image file as `datasets` stores it: within the table, or a path.

    Raises:
        UnreadableImage: a path leads out of the folders that the source's files lie in (a table is a stranger's: it may
            name any file of this machine), or to no regular file.
    """
    if image is None:
        return b""
    if image["bytes"] is not None:
        return image["bytes"]
    path = image["path"] or ""
    try:
        file = Path(path).resolve()
    except (OSError, ValueError, RuntimeError) as error:  # too long, a NUL, links in a circle
        raise UnreadableImage(path, f"its path {path!r} cannot be followed ({error})") from error
    if not any(file.is_relative_to(place) for place in places):
        raise UnreadableImage(path, f"its path {path!r} is not one of a file of the source")
    return read_file(file)
