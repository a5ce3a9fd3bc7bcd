"""Train, val and test: given by the source, or drawn by class; and how many images of a split are taken.

Within a class keys are ordered by a hash of seed and key, so that neither the order of the images nor other classes
matter, and one image more moves at most an image or two across the borders.
"""

import hashlib
import re
from collections.abc import Mapping, Sequence
from dataclasses import replace
from itertools import islice, zip_longest

from regvit.data.manifest import SPLITS, Row

SHARES = (0.70, 0.15, 0.15)  # of train, val and test, where a source has no splits
NAMES = {
    "train": ("train", "training", "trn"),
    "val": ("val", "valid", "validation", "eval", "evaluation", "dev", "development"),
    "test": ("test", "testing", "tst", "holdout"),
}
# Folders that are parts of a set and no classes either: folds, and the sides of a search.
PART = re.compile(r"(?<![a-z])(?:(?:fold|split)[\W_]*\d+|query|queries|gallery|probe|support|distractors?)(?![a-z])")
FILLER = re.compile("(set|data|dataset|images?|imgs?|seg|split|folder)$")  # what may stand beside them in a name


def split_of(name: str) -> str:
    """The split that a folder, a column's value or a published split means by its name, or "".

    Known in any case and with what stands beside them: `Training`, `seg_test`, `val2017`, `Test Images`, `trainset`.
    """
    words = split_words(name)
    return words[0] if len(words) == 1 else ""


def split_words(name: str) -> list[str]:
    """For each word of a name the split that it means, or ""; fillers left out."""
    words = [FILLER.sub("", word) for word in re.findall("[a-z]+", name.casefold())]
    return [next((split for split, names in NAMES.items() if word in names), "") for word in words if word]


def parts_named(name: str) -> set[str]:
    """The splits, folds and sides of a search (query, gallery) that a folder's name speaks of."""
    return {split for split in split_words(name) if split} | set(PART.findall(name.casefold()))


def wanted_splits(source: str, known: Sequence[str], role: str | None) -> dict[str, str]:
    """{split of a published set: split of the data set, "" where it is all there is}.

    All of its splits where it is trained on, and the held-out one (test, else val) where it is not.

    Raises:
        ValueError: none of several is called train, val or test.
    """
    if len(known) == 1:
        return {known[0]: ""}
    meaning = {name: split for name in known if (split := split_of(name))}
    if not meaning:
        raise ValueError(f"{source} has the splits {', '.join(known)}, of which none is called train, val or test; name one "
                         "at the end of the source, after a slash")  # fmt: skip
    if role in ("ood", "anomaly"):
        return {min(meaning, key=lambda name: ("test", "val", "train").index(meaning[name])): ""}
    return meaning


def stratified_splits(labels: Mapping[str, str], seed: int, shares: tuple[float, float, float]) -> dict[str, str]:
    """Assign keys to train, val and test, each class in the same shares.

    Args:
        labels: class of each key.
        shares: of train, val and test; their sum is 1.
    Returns:
        Split of each key, in the order of `labels`.
    Raises:
        ValueError: a share is negative or the sum is not 1.
    """
    if min(shares) < 0 or abs(sum(shares) - 1) > 1e-9:
        raise ValueError(f"shares {shares} of train, val and test must not be negative and must sum to 1")
    split = {}
    for keys in _by_class(labels, seed):
        ends = round(len(keys) * shares[0]), round(len(keys) * (shares[0] + shares[1]))
        for place, key in enumerate(keys):
            split[key] = SPLITS[sum(place >= end for end in ends)]
    return {key: split[key] for key in labels}


def assign_splits(rows: Sequence[Row], seed: int, role: str | None) -> list[Row]:
    """The rows with the splits that their data set uses.

    - None has a split: drawn, but all test where nothing is trained on them (role ood or anomaly).
    - train and val alone (ImageNet, published without test labels): val is the test split.
    - No val: taken out of train.
    """
    given = {row.split for row in rows}
    if given <= {""} and role in ("ood", "anomaly"):
        return [replace(row, split="test") for row in rows]
    if given <= {""}:
        drawn = stratified_splits({row.image_id: row.label for row in rows}, seed, SHARES)
        return [replace(row, split=drawn[row.image_id]) for row in rows]
    if "train" in given and "test" not in given:
        rows = [replace(row, split="test") if row.split == "val" else row for row in rows]
        given -= {"val"}
    if "val" in given:
        return list(rows)
    train = {row.image_id: row.label for row in rows if row.split == "train"}
    drawn = stratified_splits(train, seed, (1 - SHARES[1], SHARES[1], 0.0))
    return [replace(row, split=drawn.get(row.image_id, row.split)) for row in rows]


def limit_splits(rows: Sequence[Row], images: Mapping[str, int], seed: int) -> list[Row]:
    """At most `images[split]` rows of each split that is named, as evenly from its classes as they allow, in their order."""
    taken = set()
    for split, count in images.items():
        labels = {row.image_id: row.label for row in rows if row.split == split}
        rounds = zip_longest(*_by_class(labels, seed))
        taken.update(islice((key for keys in rounds for key in keys if key is not None), count))
    return [row for row in rows if row.split not in images or row.image_id in taken]


def _by_class(labels: Mapping[str, str], seed: int) -> list[list[str]]:
    """The keys of each class in the order that the seed gives them; classes sorted by name."""
    keys: dict[str, list[str]] = {label: [] for label in sorted(set(labels.values()))}
    for key, label in labels.items():
        keys[label].append(key)
    return [
        sorted(of_class, key=lambda key: hashlib.sha256(f"{seed}:{key}".encode()).digest())
        for of_class in keys.values()
    ]
