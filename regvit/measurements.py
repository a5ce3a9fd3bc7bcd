"""What registers change, at one glance: a row a measure, a column a run, and a column for each run held against another.

A difference is paired (the same images in both runs) or it is not given: from the values of each image where they are in
metrics/, from the measurement itself where it has looked at the run and at its untreated backbone together.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

from .compare import MARKS, Table
from .comparisons import Measurements, Value, datasets_of, paired_difference, value_of

TITLE = "What registers change"
NONE = "–"


@dataclass(frozen=True)
class Measure:
    """A row.

    Args:
        label: with data set and unit.
        scale: what the metrics' value is multiplied by, 100 for percent.
        digits: after the point.
        better: 1 where more is better, −1 where less is, 0 where neither is.
        of: the run's value; None where it has none.
        change: paired difference of a run to another; None where there is none.
    """

    label: str
    scale: float
    digits: int
    better: int
    of: Callable[[Measurements], Value | None]
    change: Callable[[Measurements, Measurements], Value | None] = lambda run, reference: None


def measurement_table(runs: Sequence[Measurements], seed: int = 0) -> Table:
    """All measures that some run has.

    Args:
        runs: in the order of their columns.
        seed: of the bootstrap of paired differences.
    """
    by_name = {run.name: run for run in runs}
    pairs = [(run, by_name[run.run.reference]) for run in runs if run.run.reference in by_name]
    header = ("measure", "images", *(run.name for run in runs), *(f"{run.name} − {other.name}" for run, other in pairs))
    rows = []
    for measure in measures(runs, seed):
        values = [measure.of(run) for run in runs]
        if all(value is None for value in values):
            continue
        cells = [show(value, measure.scale, measure.digits) for value in values]
        changes = (measure.change(run, other) for run, other in pairs)
        cells += [show_change(change, measure.scale, measure.digits, measure.better) for change in changes]
        rows.append((measure.label, _images(values), *cells))
    note = (
        "Brackets: 95 % intervals over images. Differences are of the same images in both runs; ▲ better, ▼ worse where the"
        " interval leaves out zero, unmarked where neither direction is better; – where there is no outlier to measure at,"
        " or nothing to pair. Outliers are those of the backbone without registers, so that the same places are compared."
    )
    return Table(TITLE, header, tuple(rows), note if pairs and rows else "")


def measures(runs: Sequence[Measurements], seed: int = 0) -> Iterator[Measure]:
    """Every measure, in the order of the rows."""
    yield Measure("outlier patches, %", 100, 2, -1, outliers)
    yield Measure("CLS cosine to the model before planting", 1, 3, 1, lambda run: _verified(run, "cls_cosine"))
    for name in datasets_of(runs, "attention"):
        yield from _attention(name)
    for name in datasets_of(runs, "tokens"):
        yield from _tokens(name)
    for name in datasets_of(runs, "discover"):
        yield from _discovery(name, seed)
    for name in datasets_of(runs, "segment"):
        yield from _segmentation(name, seed)
    for name in datasets_of(runs, "depth"):
        yield from _depth(name, seed)
    for readout in ("cls", "patch_mean"):
        yield _accuracy(readout)


def outliers(run: Measurements) -> Value | None:
    """Share of patches that are outliers in the run's own model; None where its backbone shows none.

    On held-out images where the run was held against the model before planting, else on the images of the search.
    """
    identify, verify = run.run.identify, run.run.verify
    if not identify["outliers_found"]:
        return None
    if verify.get("outlier_fraction") is not None:
        return value_of(verify, "outlier_fraction", verify.get("images"))
    key = "outlier_fraction_after" if run.run.registers == "test_time" else "outlier_fraction"
    return value_of(identify, key, identify.get("images"))


def show(value: Value | None, scale: float, digits: int) -> str:
    """`65.2 [61.0–69.1]`, or `–`."""
    if value is None:
        return NONE
    middle = number(scale * value.value, digits)
    if value.lo is None or value.hi is None:
        return middle
    low, high = (number(scale * end, digits) for end in (value.lo, value.hi))
    dash = ", " if low.startswith("−") else "–"
    return f"{middle} [{low}{dash}{high}]"


def show_change(value: Value | None, scale: float, digits: int, better: int) -> str:
    """`+1.2 [−0.3, +2.7]` and its mark, or `–`."""
    if value is None:
        return NONE + MARKS[0]
    parts = [number(scale * each, digits, signed=True) for each in (value.value, value.lo, value.hi)]
    return f"{parts[0]} [{parts[1]}, {parts[2]}]" + MARKS[better * value.side]


def number(value: float, digits: int, signed: bool = False) -> str:
    """With a minus sign of its own width; `±0.0` where a signed one rounds to zero."""
    text = f"{abs(value):.{digits}f}"
    if float(text) == 0:
        return ("±" if signed else "") + text
    return ("−" if value < 0 else "+" if signed else "") + text


def _images(values: Sequence[Value | None]) -> str:
    """How many images are behind the figures of a row; fewer where a run has none with outliers."""
    counts = sorted({value.n for value in values if value is not None and value.n is not None})
    return "–".join(str(n) for n in (counts[:1] + counts[-1:] if len(counts) > 1 else counts)) or NONE


def _verified(run: Measurements, key: str) -> Value | None:
    return value_of(run.run.verify, key, run.run.verify.get("images_with_outliers"))


def _attention(name: str) -> Iterator[Measure]:
    def of(key: str) -> Callable[[Measurements], Value | None]:
        return lambda run: value_of(run.of("attention", name, "heads"), key, run.of("attention", name).get("n"))

    def change(key: str) -> Callable[[Measurements, Measurements], Value | None]:
        """The stage measures a treated run and its untreated backbone on the same images."""

        def paired(run: Measurements, other: Measurements) -> Value | None:
            if run.backbone != other.backbone or not other.untouched:
                return None
            return value_of(run.of("attention", name, "change", "heads"), key)

        return paired

    for key, label, scale, digits, better in (
        ("on_outliers", f"CLS attention on outliers, {name}, %", 100, 1, -1),
        ("entropy", f"entropy of CLS attention, {name}, nats", 1, 2, 0),
        ("morans_i", f"coherence of CLS attention (Moran's I), {name}", 1, 3, 1),
        ("object_auroc", f"CLS attention finds objects (AUROC), {name}, %", 100, 1, 1),
    ):
        yield Measure(label, scale, digits, better, of(key), change(key))


def _tokens(name: str) -> Iterator[Measure]:
    for what, key, label, scale, digits in (
        ("position", "top1", "position read from {} patch, {}, top-1 %", 100, 1),
        ("pixels", "l2", "pixels read from {} patch, {}, L2 error", 1, 2),
    ):
        for kind, article in (("normal", "a normal"), ("outlier", "an outlier")):
            yield Measure(
                label.format(article, name), scale, digits, 0,
                lambda run, what=what, kind=kind, key=key: value_of(run.of("tokens", name, what, kind), key),
            )  # fmt: skip


def _discovery(name: str, seed: int) -> Iterator[Measure]:
    for path, column, label in (
        ((), "hit", f"CorLoc of the chosen setting, {name}, %"),
        (("mean_over_features",), "mean_over_features", f"CorLoc, mean over all features, {name}, %"),
    ):
        yield Measure(
            label, 100, 1, 1,
            lambda run, path=path: value_of(run.of("discover", name, *path), "corloc", run.of("discover", name).get("n")),
            lambda run, other, column=column: paired_difference(run, other, "discover", name, column, seed=seed),
        )  # fmt: skip


def _segmentation(name: str, seed: int) -> Iterator[Measure]:
    def of(key: str) -> Callable[[Measurements], Value | None]:
        return lambda run: value_of(run.of("segment", name), key)

    yield Measure(f"segmentation mIoU, {name}, %", 100, 1, 1, of("miou"))  # of all pixels: no value an image
    for key, right, pixels, where in (
        ("accuracy", "right", "pixels", ""),
        ("accuracy_at_outliers", "right_at_outliers", "at_outliers", " at outliers"),
    ):
        yield Measure(
            f"segmentation pixel accuracy{where}, {name}, %", 100, 1, 1, of(key),
            lambda run, other, right=right, pixels=pixels: paired_difference(
                run, other, "segment", name, right, pixels, seed
            ),
        )  # fmt: skip


def _depth(name: str, seed: int) -> Iterator[Measure]:
    for key, where in (("rmse", ""), ("rmse_at_outliers", " at outliers")):
        yield Measure(
            f"depth RMSE{where}, {name}, m", 1, 3, -1,
            lambda run, key=key: value_of(run.of("depth", name), key),
            lambda run, other, key=key: paired_difference(run, other, "depth", name, key, seed=seed),
        )  # fmt: skip


def _accuracy(readout: str) -> Measure:
    def of(run: Measurements) -> Value | None:
        return value_of(run.run.evaluate.get(readout, {}).get("id", {}), "top1")

    def change(run: Measurements, other: Measurements) -> Value | None:
        if run.run.reference != other.name:
            return None
        return value_of(run.run.against.get(f"{readout}-{readout}", {}).get("id", {}), "top1")

    return Measure(f"ID top-1 from {readout}, %", 100, 1, 1, of, change)
