"""A data set's entry in `params.yaml`, which classes of the source it takes, and what its role asks of the images.

Data sets meet by class name: an image of an OOD set is right where its class is called as in the in-distribution set.
`classes` keeps some classes, renames them, or makes several into one:

    [cat, dog]                              # keep these, under their own names
    {cat: [tabby, siamese], dog: n02084071} # new name: one or several of the source's
    classes.csv                             # a file, one line a class of the source: `tabby,cat`, or just `tabby`
"""

import csv
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from difflib import get_close_matches
from pathlib import Path
from unicodedata import normalize

from regvit.data.manifest import SPLITS, Row

MAX_REJECTS = 0.1  # share; more than this says that the source is not what it was taken for
POLICIES = ("reject", "fail")
Described = Sequence | Mapping | str  # classes, as params.yaml gives them


@dataclass(frozen=True)
class Entry:
    """What `params.yaml` says of a data set.

    Attributes:
        source: see the table of `regvit.data.sources`.
        role: "id", "ood" or "anomaly"; None where the set is never classified.
        classes: those to take, perhaps under new names, see above; None takes all.
        images: at most so many of a split, drawn by the seed, as evenly from the classes as they allow; None takes all.
        rejects: "reject" lists unusable images in `rejected.csv` and goes on, "fail" stops at the first.
        max_rejects: largest share of unusable images, in [0, 1].
    """

    source: str
    role: str | None = None
    classes: Described | None = None
    images: Mapping[str, int] | None = None
    rejects: str = "reject"
    max_rejects: float = MAX_REJECTS

    def __post_init__(self):
        if self.rejects not in POLICIES:
            raise ValueError(f"rejects is {self.rejects!r}; expected one of {', '.join(POLICIES)}")
        if not 0 <= self.max_rejects <= 1:
            raise ValueError(f"max_rejects is {self.max_rejects}; expected a share in [0, 1]")
        for split, count in (self.images or {}).items():
            if split not in SPLITS or count < 1:
                raise ValueError(f"images has {split}: {count}; expected {', '.join(SPLITS)}, each a number from 1 on")


def check_role(name: str, role: str | None, rows: Sequence[Row]) -> None:
    """What would stop evaluation hours later is said here: a role needs certain splits, labels and classes.

    Raises:
        ValueError: the rows cannot play the role.
    """
    if role is None:
        return
    splits = {row.split for row in rows}
    if "test" not in splits:
        raise ValueError(f"data set {name!r} has no test images of {len(rows)}; give it a test/ folder, or more images")
    if role == "anomaly":
        return
    if bare := [row.path for row in rows if not row.label]:
        raise ValueError(
            f"data set {name!r} has the role {role}, but {len(bare)} of its {len(rows)} images have no class, such as "
            f"{bare[0]}; put them into class folders, or give the set the role anomaly"
        )
    trained = sorted({row.label for row in rows if row.split == "train"})
    if role == "id" and len(trained) < 2:
        raise ValueError(
            f"data set {name!r} has the role id, but its train split has {len(trained)} class(es) "
            f"{trained}; a classifier needs at least 2"
        )
    if role == "id" and "val" not in splits:
        raise ValueError(
            f"data set {name!r} has the role id, but no val images to choose settings on; give more images a class, "
            "or a val/ folder"
        )


@dataclass(frozen=True)
class ClassChoice:
    """The classes to take.

    Attributes:
        new_names: what each class of the source that is taken is to be called, in the order of the label indices.
    """

    new_names: Mapping[str, str]

    @property
    def classes(self) -> tuple[str, ...]:
        """The new names, each once."""
        return tuple(dict.fromkeys(self.new_names.values()))

    @classmethod
    def of(cls, described: Described) -> "ClassChoice":
        """The choice that params.yaml describes: a list, a dict, or the path of a file (.csv or .txt).

        Raises:
            ValueError: it is empty, a class of the source is named twice, or the file has another suffix.
            FileNotFoundError: the file does not exist.
        """
        if isinstance(described, str):
            return _read(Path(described).expanduser())
        if isinstance(described, Mapping):
            pairs = [(str(old), str(new)) for new, olds in described.items() for old in _listed(olds)]
        else:
            pairs = [(str(name), str(name)) for name in described]
        return cls._of_pairs(pairs, f"classes {described!r}")

    @classmethod
    def _of_pairs(cls, pairs: Sequence[tuple[str, str]], where: str) -> "ClassChoice":
        if not pairs:
            raise ValueError(f"{where[:200]} names no class; name at least one, or leave `classes` out to take all")
        pairs = [(normalize("NFC", name), normalize("NFC", new)) for name, new in pairs]  # as labels are
        old = [name for name, _ in pairs]
        if twice := sorted({name for name in old if old.count(name) > 1}) if len(set(old)) < len(old) else []:
            raise ValueError(f"{where[:200]} names {twice[0]!r} twice; a class of the source can become only one")
        if empty := [pair for pair in pairs if "" in pair]:
            raise ValueError(f"{where[:200]} has an empty name in {empty[0]!r}; give both names")
        return cls(dict(pairs))

    def check(self, found: Iterable[str]) -> None:
        """Hold the choice against the classes that the source has.

        Raises:
            ValueError: one that is to be taken is not there; the message counts them and gives the nearest name.
        """
        found = set(found) - {""}
        missing = [name for name in self.new_names if name not in found]
        if missing:
            near = get_close_matches(missing[0], sorted(found), n=1, cutoff=0)
            raise ValueError(
                f"{len(missing)} of the {len(self.new_names)} classes that `classes` names are not among the "
                f"{len(found)} of the source: {', '.join(missing[:5])}{', …' if len(missing) > 5 else ''}"
                + (f"; nearest to the first is {near[0]!r}" if near else "; the source has no classes at all")
            )


def _listed(names: object) -> list:
    return list(names) if isinstance(names, list | tuple) else [names]


def _read(file: Path) -> ClassChoice:
    """A choice from a file; a line of a .csv or .txt is `class of the source[,new name]`."""
    if not file.is_file():
        raise FileNotFoundError(f"{file}, the file that `classes` names, does not exist; give a list, a dict of "
                                "new names, or the path of a .csv or .txt file")  # fmt: skip
    if file.suffix not in (".csv", ".txt"):
        raise ValueError(f"{file} ends in {file.suffix!r}; a file of classes is a .csv or .txt")
    with open(file, newline="", encoding="utf-8-sig") as stream:
        lines = [line for line in csv.reader(stream, strict=True) if line and not line[0].startswith("#")]
    if long := [line for line in lines if len(line) > 2]:
        raise ValueError(f"{file}: {','.join(long[0])!r} has {len(long[0])} fields; write `class of the source,new "
                         "name`, and put a name with a comma in double quotes")  # fmt: skip
    return ClassChoice._of_pairs([(line[0].strip(), line[-1].strip()) for line in lines], str(file))
