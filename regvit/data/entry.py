"""A data set's entry in `params.yaml`, and what its role asks of the images."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from regvit.data.class_choice import Described
from regvit.data.manifest import SPLITS, Row

MAX_REJECTS = 0.1  # share; more than this says that the source is not what it was taken for
POLICIES = ("reject", "fail")


@dataclass(frozen=True)
class Entry:
    """What `params.yaml` says of a data set.

    Attributes:
        source: see the table of `regvit.data.sources`.
        role: "id", "ood" or "anomaly"; None where the set is never classified.
        classes: those to take, perhaps under new names, see `class_choice`; None takes all.
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
