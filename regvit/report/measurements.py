"""What registers change, at one glance: a row a measure, a column a run, and a column for each run held against another.

A difference is paired (the same images in both runs) or it is not given: from the values of each image where they are in
metrics/, from the measurement itself where it has looked at the run and at its untreated backbone together.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

from regvit.report.compare import MARKS, Table
from regvit.report.comparisons import (
    Measurements,
    Value,
    column_mean,
    datasets_of,
    paired_difference,
    paired_miou_difference,
    value_of,
)

TITLE = "What registers change"
NONE = "–"


@dataclass(frozen=True)
class Measure:
    """A row.

    Args:
        label: with the unit.
        dataset: whose images are measured.
        scale: what the metrics' value is multiplied by, 100 for percent.
        digits: after the point.
        better: 1 where more is better, −1 where less is, 0 where neither is.
        of: the run's value; None where it has none.
        change: paired difference of a run to another; None where there is none.
        across: the same where the two may be of different experiments, so that the stage itself has not seen both.
    """

    label: str
    dataset: str
    scale: float
    digits: int
    better: int
    of: Callable[[Measurements], Value | None]
    change: Callable[[Measurements, Measurements], Value | None] = lambda run, reference: None
    across: Callable[[Measurements, Measurements], Value | None] = lambda run, reference: None


def measurement_table(runs: Sequence[Measurements], in_distribution: str, seed: int = 0) -> Table:
    """All measures that some run has.

    Args:
        runs: in the order of their columns.
        in_distribution: name of the ID set.
        seed: of the bootstrap of paired differences.
    """
    by_name = {run.name: run for run in runs}
    pairs = [(run, by_name[run.run.reference]) for run in runs if run.run.reference in by_name]
    header = (
        "measure",
        "data set",
        "n",
        *(run.name for run in runs),
        *(f"{run.name} − {other.name}" for run, other in pairs),
    )
    rows = []
    for measure in measures(runs, in_distribution, seed):
        values = [measure.of(run) for run in runs]
        if all(value is None for value in values):
            continue
        cells = [show(value, measure.scale, measure.digits) for value in values]
        changes = (measure.change(run, other) for run, other in pairs)
        cells += [show_change(change, measure.scale, measure.digits, measure.better) for change in changes]
        rows.append((measure.label, measure.dataset, _images(values), *cells))
    note = (
        "Brackets: 95 % intervals over the n images. Differences are of the same images in both runs; ▲ better, ▼ worse"
        " where the interval leaves out zero, unmarked where neither direction is better; – where there is no outlier to measure at,"
        " or where the two have other outliers. Outliers are those of the backbone without registers, so that the same"
        " places are compared."
    )
    return Table(TITLE, header, tuple(rows), note if pairs and rows else "")


def measures(runs: Sequence[Measurements], in_distribution: str, seed: int = 0) -> Iterator[Measure]:
    """Every measure, in the order of the rows."""
    yield from patch_measures(runs, in_distribution, seed)
    for readout in ("cls", "patch_mean"):
        yield _accuracy(readout, in_distribution)


def patch_measures(runs: Sequence[Measurements], in_distribution: str, seed: int = 0) -> Iterator[Measure]:
    """Every measure but the accuracies of probes."""
    for label, scale, digits, better, of, column in (
        ("outlier patches, %", 100, 2, -1, outliers, "outlier_fraction"),
        ("CLS cosine to the unplanted model", 1, 3, 1, lambda run: _verified(run, "cls_cosine"), "cls_cosine"),
    ):
        yield _by_images(
            label, in_distribution, scale, digits, better, of,
            lambda run, other, column=column: paired_difference(
                run, other, "verify", in_distribution, column, seed=seed
            ),
        )  # fmt: skip
    for name in datasets_of(runs, "attention"):
        yield from _attention(name, seed)
    for name in datasets_of(runs, "tokens"):
        yield from _tokens(name, seed)
    for name in datasets_of(runs, "discover"):
        yield from _discovery(name, seed)
    for name in datasets_of(runs, "segment"):
        yield from _segmentation(name, seed)
    for name in datasets_of(runs, "depth"):
        yield from _depth(name, seed)
    for name in datasets_of(runs, "zeroshot"):
        yield _zeroshot(name)


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


def _attention(name: str, seed: int) -> Iterator[Measure]:
    def of(run: Measurements, key: str) -> Value | None:
        metrics = run.of("attention", name)
        return value_of(metrics.get("heads", {}), key, metrics.get("n_with_outliers" if key == "on_outliers" else "n"))

    def change(run: Measurements, other: Measurements, key: str) -> Value | None:
        if key == "on_outliers" and run.backbone != other.backbone:  # whose outliers are at other places
            return None
        return paired_difference(run, other, "attention", name, key, seed=seed)

    for key, label, scale, digits, better in (
        ("on_outliers", "CLS attention on outliers, %", 100, 1, -1),
        ("on_registers", "CLS attention on registers, %", 100, 1, 0),
        ("largest", "largest weight of CLS attention, %", 100, 1, 0),
        ("entropy", "entropy of CLS attention, nats", 1, 2, 0),
        ("morans_i", "coherence of CLS attention", 1, 3, 1),
        ("object_auroc", "object AUROC of CLS attention, %", 100, 1, 1),
    ):
        yield _by_images(
            label, name, scale, digits, better,
            lambda run, key=key: of(run, key),
            lambda run, other, key=key: change(run, other, key),
        )  # fmt: skip


def _tokens(name: str, seed: int) -> Iterator[Measure]:
    def change(run: Measurements, other: Measurements, column: str) -> Value | None:
        if run.backbone != other.backbone:  # whose outliers are at other places
            return None
        return paired_difference(run, other, "tokens", name, column, seed=seed)

    for what, key, label, scale, digits, better in (
        ("position", "top1", "position, {} patch, top-1 %", 100, 1, 1),
        ("pixels", "l2", "pixels, {} patch, L2 error", 1, 2, -1),
    ):
        for kind in ("normal", "outlier"):
            yield _by_images(
                label.format(kind), name, scale, digits, better,
                lambda run, what=what, kind=kind, key=key: value_of(run.of("tokens", name, what, kind), key),
                lambda run, other, column=f"{key}_{kind}": change(run, other, column),
            )  # fmt: skip


def _discovery(name: str, seed: int) -> Iterator[Measure]:
    for path, column, label in (
        ((), "hit", "CorLoc of the chosen setting, %"),
        (("mean_over_features",), "mean_over_features", "CorLoc, mean over all features, %"),
    ):
        yield _by_images(
            label, name, 100, 1, 1,
            lambda run, path=path: value_of(run.of("discover", name, *path), "corloc", run.of("discover", name).get("n")),
            lambda run, other, column=column: paired_difference(run, other, "discover", name, column, seed=seed),
        )  # fmt: skip


def _segmentation(name: str, seed: int) -> Iterator[Measure]:
    def of(key: str) -> Callable[[Measurements], Value | None]:
        return lambda run: _among(run.of("segment", name), key)

    def by_image(run: Measurements) -> Value | None:
        return column_mean(run, "segment", name, "miou", seed)

    yield _by_images(
        "segmentation mIoU, %", name, 100, 1, 1, of("miou"),
        lambda run, other: paired_miou_difference(run, other, name, seed),
    )  # fmt: skip
    yield _by_images(
        "segmentation mIoU by image, %", name, 100, 1, 1, by_image,
        lambda run, other: paired_difference(run, other, "segment", name, "miou", seed=seed),
    )  # fmt: skip
    for key, right, pixels, where in (
        ("accuracy", "right", "pixels", ""),
        ("accuracy_at_outliers", "right_at_outliers", "at_outliers", " at outliers"),
    ):
        yield _by_images(
            f"pixel accuracy{where}, %", name, 100, 1, 1, of(key),
            lambda run, other, right=right, pixels=pixels: paired_difference(
                run, other, "segment", name, right, pixels, seed
            ),
        )  # fmt: skip


def _depth(name: str, seed: int) -> Iterator[Measure]:
    for key, where in (("rmse", ""), ("rmse_at_outliers", " at outliers")):
        yield _by_images(
            f"depth RMSE{where}, m", name, 1, 3, -1,
            lambda run, key=key: _among(run.of("depth", name), key),
            lambda run, other, key=key: paired_difference(run, other, "depth", name, key, seed=seed),
        )  # fmt: skip


def _zeroshot(name: str) -> Measure:
    def change(run: Measurements, other: Measurements) -> Value | None:
        """The stage measures a treated run and its untreated backbone on the same images."""
        if run.backbone != other.backbone or not other.untouched:
            return None
        return value_of(run.of("zeroshot", name), "gain")

    return Measure(
        "zero-shot top-1, %", name, 100, 1, 1, lambda run: value_of(run.of("zeroshot", name), "top1"), change
    )


def _by_images(
    label: str,
    dataset: str,
    scale: float,
    digits: int,
    better: int,
    of: Callable[[Measurements], Value | None],
    change: Callable[[Measurements, Measurements], Value | None],
) -> Measure:
    """A measure whose tables have a value an image, so that any two runs pair."""
    return Measure(label, dataset, scale, digits, better, of, change, change)


def _among(values: Mapping, key: str) -> Value | None:
    """A figure of dense prediction, with the number of images that it is from."""
    found = value_of(values, key)
    return replace(found, n=values["n_with_outliers"]) if found and key.endswith("at_outliers") else found


def _accuracy(readout: str, in_distribution: str) -> Measure:
    def of(run: Measurements) -> Value | None:
        return value_of(run.run.evaluate.get(readout, {}).get("id", {}), "top1")

    def change(run: Measurements, other: Measurements) -> Value | None:
        if run.run.reference != other.name:
            return None
        return value_of(run.run.against.get(f"{readout}-{readout}", {}).get("id", {}), "top1")

    return Measure(f"top-1 from {readout}, %", in_distribution, 100, 1, 1, of, change)
