"""Images of the user's, which stay where they are: a tree of class folders, or a list of files (see `image_list`).

| path | splits |
|---|---|
| `<path>/<class>/…` | by the seed; all test if the set is not trained on (role ood or anomaly) |
| `<path>/{train,val,test}/<class>/…` | the folders', by their usual names; val is taken out of train if it is missing |
| `<path>/{train,val}/<class>/…` | as published without test labels (ImageNet): val is the test split, and as above |
| `<list>.csv`, `.tsv`, `.txt` | `path,label[,split]` a line, as above where no split is given |

An image outside of a class folder has no label. No file vanishes: each is an image, stands in `rejected.csv` with its
reason, or is counted among those that are not taken.
"""

import os
import sys
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path

from regvit.data.dataset_builder import DatasetBuilder, name_problem
from regvit.data.decoding import image_suffixes
from regvit.data.manifest import Row
from regvit.data.sources.image_list import LIST_SUFFIXES, read_list
from regvit.data.splits import parts_named, split_of


def folder(builder: DatasetBuilder, rest: str) -> None:
    """A tree of images, or a list of them, read in place."""
    path = Path(rest).expanduser()
    builder.about["images"] = "read in place; see their owner for licence and attribution"
    if path.is_file() and path.suffix.lower() in LIST_SUFFIXES:
        root, rows = read_list(path)
        builder.read_in_place(root, builder.plan(rows))
    elif path.is_dir():
        read_tree(builder, path)
    else:
        what = "is neither a folder nor a list" if path.exists() else "does not exist"
        raise FileNotFoundError(f"{path}, the folder of source {builder.entry.source!r}, {what}; "
                                f"give a folder or a list ({', '.join(LIST_SUFFIXES)}) by an absolute path, or by one "
                                "relative to where the command runs")  # fmt: skip


def read_tree(builder: DatasetBuilder, root: Path, wrapped: bool = False) -> None:
    """Rows for every image under `root`, read in place, with class and split by their folders.

    Args:
        wrapped: whether to go down first while a single folder holds all images, as archives have one named like
            themselves, and as long as that has folders with images itself.
    Raises:
        ValueError: there is no image, or the folders can be read as splits and as classes.
    """
    found = survey(root)
    names = found.images
    if not names:
        raise ValueError(f"{root} holds no image; looked for {', '.join(image_suffixes())} in it and all its folders")
    builder.left_out += found.others
    while wrapped and len({name.split("/")[0] for name in names}) == 1 and any(name.count("/") > 1 for name in names):
        root, names = root / names[0].split("/")[0], [name.partition("/")[2] for name in names]
    splits, rows = _splits_on_top(root, names), []
    for path, reason in found.unreadable.items():
        builder.reject(Row(path, path, "", ""), f"the folder cannot be read: {reason}")
    for name in names:
        *folders, _ = name.split("/")
        if problem := name_problem(name):
            builder.reject(Row(name, name, "", ""), problem)
        elif splits and not folders:
            builder.reject(Row(name, name, "", ""), "it lies beside the split folders; move it into one")
        else:
            split = splits[folders.pop(0)] if splits else ""
            rows.append(Row(name, name, sys.intern(folders[0]) if folders else "", split))
    builder.read_in_place(root, builder.plan(rows))


@dataclass
class Survey:
    """What lies under a folder.

    Attributes:
        images: paths of the files whose suffix is that of an image, relative to the folder, sorted.
        others: how many other files there are of each suffix.
        unreadable: folders that cannot be listed, with the reason.
    """

    images: list[str] = field(default_factory=list)
    others: Counter[str] = field(default_factory=Counter)
    unreadable: dict[str, str] = field(default_factory=dict)


def survey(root: Path) -> Survey:
    """Every file under a folder; links are followed, but not to what is here anyway."""
    found, suffixes = Survey(), image_suffixes()
    top = os.path.realpath(root)
    visited = {top}

    def unreadable(error: OSError) -> None:
        found.unreadable[os.path.relpath(error.filename, root)] = error.strerror

    for folder, folders, files in os.walk(root, followlinks=True, onerror=unreadable):
        kept = []
        for name in sorted(folders):
            real = os.path.realpath(os.path.join(folder, name))
            again = os.path.islink(os.path.join(folder, name)) and os.path.commonpath((real, top)) in (real, top)
            if again or real in visited:
                found.others["links to folders that are here anyway"] += 1
            else:
                kept.append(name)
                visited.add(real)
        folders[:] = kept
        for name in files:
            path = os.path.relpath(os.path.join(folder, name), root)
            suffix = os.path.splitext(name)[1].lower()
            if path.startswith(".") or "/." in path:
                found.others["hidden"] += 1
            elif suffix in suffixes:
                found.images.append(path)
            else:
                found.others[suffix or "without a suffix"] += 1
    found.images.sort()
    return found


def _splits_on_top(root: Path, names: list[str]) -> dict[str, str]:
    """What split each of the topmost folders is; {} where they are classes.

    Raises:
        ValueError: some are splits and some are not, two are the same one, all are called like splits, folds or sides of a
            search, or splits lie within the topmost folders. (One folder among classes that is called "train" and holds
            nothing but images is a class.)
    """
    below: dict[str, set[str]] = {}
    for name in names:
        top, _, rest = name.partition("/")
        if rest:
            below.setdefault(top, set()).add(rest.partition("/")[0] if "/" in rest else "")
    inner = {split for folders in below.values() for folder in folders if (split := split_of(folder))}
    if len(inner) > 1:
        raise ValueError(f"{root} has split folders ({', '.join(sorted(inner))}) within {', '.join(sorted(below)[:5])}; give "
                         "a folder in which they lie on top, with the class folders in them")  # fmt: skip
    splits = {top: split for top in sorted(below) if (split := split_of(top))}
    others = sorted(below.keys() - splits.keys())
    if others and (len(splits) > 1 or any(below[top] - {""} for top in splits)):
        raise ValueError(f"{root} has split folders ({', '.join(splits)}) beside others ({', '.join(others[:5])}); "
                         "leave only train, val and test, or only class folders")  # fmt: skip
    parts = [parts_named(top) for top in others]
    if len({*splits.values()}.union(*parts)) > 1 and others and all(parts):
        raise ValueError(f"{root} has folders that are called like splits ({', '.join(sorted(below)[:5])}), but not as any "
                         "that is known; call them train, val and test, or give a list of path,label,split")  # fmt: skip
    if others:
        return {}
    if len(set(splits.values())) < len(splits):
        raise ValueError(f"{root} has several folders of one split ({', '.join(splits)}); leave one of each")
    return splits
