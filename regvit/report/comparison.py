"""The tables of the comparison: a row a measure or a run, from the figures and paired differences of a study.

The CLS readout of a run is held against that of its reference (`references`), its other readouts against its own CLS. A
figure is marked where the 95 % interval of that paired difference leaves out zero: ▲ better, ▼ worse.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from math import isnan

import pandas as pd

from regvit.report.catalogue import METRICS, NEITHER, Metric
from regvit.report.results import Place, Results
from regvit.report.study import ANOMALIES, MEASUREMENTS, OOD, Study, Value
from regvit.report.tables import NONE, Cell, Table, number, show, show_change

CLASSIFIERS = {"linear": "linear probe", "logistic": "logistic regression", "knn": "kNN"}
AT_A_GLANCE = ("cls", "patch_mean")  # readouts in the first table
README_ROWS = (  # (stage, metric) of the README's table
    ("verify", "outlier_fraction"), ("verify", "cls_cosine"), ("attention", "on_outliers"), ("attention", "morans_i"),
    ("attention", "object_auroc"), ("discover", "corloc_mean"), ("segment", "miou"), ("depth", "rmse"),
    ("evaluate", "top1"),
)  # fmt: skip
README_MOST = 10  # rows
TITLES = {
    "verify": "Outliers on held-out images, and cosine to the model before planting",
    "attention": "CLS attention in the later blocks",
    "tokens": "What one patch tells, and where outliers sit",
    "token_classes": "Class from one token, top-1 %",
    "discover": "CorLoc, % [95 % interval]",
    "discover_published": "CorLoc as published, % [95 % interval]",
    "segment": "Segmentation",
    "depth": "Depth",
    "hummingbird": "Segmentation in context",
    "correspond": "Correspondence",
    "retrieve": "Retrieval",
    "zeroshot": "Zero-shot classification",
    "zeroshot_segment": "Zero-shot segmentation",
}
COSTS = [Metric(label, NEITHER, 1, digits) for label, digits in (
    ("channels", 0), ("parameters of the head", 0), ("GFLOP an image", 3), ("without registers", 3),
)]  # fmt: skip
SINKS = {  # of `verify`'s diagnosis: column, scale, digits
    "CLS attention, %": ("cls_attention", 100, 1),
    "norm, times others'": ("sink_norm", 1, 1),
    "values' norm, times others'": ("value_ratio", 1, 2),
    "effective rank": ("effective_rank", 1, 1),
}
TOP1, AUROC, FPR95 = (METRICS["evaluate"][name] for name in ("top1", "auroc", "fpr95"))


def comparison(results: Results) -> list[Table]:
    """The tables that `make compare` prints and the page begins with; those without rows are left out."""
    tables = [glance_table(results), accuracy_table(results), classifier_table(results), anomaly_table(results)]
    tables += [detector_table(results), difference_table(results), cost_table(results), control_table(results)]
    tables += [class_table(results), measurement_table(results, "verify", results.study.in_distribution)]
    return [table for table in tables if table]


def glance_table(results: Results, rows: Sequence[tuple[str, str]] | None = None) -> Table:
    """What registers change: a row a measure, a column a run, and a column for each run held against another.

    Args:
        rows: (stage, metric) of the measures; None: all that have a row here.
    """
    study = results.study
    held = [(run, other) for run, other in study.references.items() if other in study.runs]
    lines = []
    for place, metric in _at_a_glance(results):
        if rows is not None and ((place.stage, place.metric) not in rows or place.readout not in ("", "cls")):
            continue
        values = [_value(results, run, place) for run in study.runs]
        cells = [show(value, metric) for value in values]
        known = [pair for pair in held if all(_value(results, run, place) for run in pair)]
        changes = [show_change(results.change(pair[0], place) if pair in known else None, metric) for pair in held]
        label = metric.glance.format(readout=place.readout)
        lines.append((label, place.dataset, _images(values), *cells, *changes))
    header = ("measure", "data set", "n", *study.runs, *(f"{run} − {other}" for run, other in held))
    note = (
        "Brackets: 95 % intervals over the n images. Differences are of the same images in both runs; ▲ better, ▼ worse"
        " where the interval leaves out zero, unmarked where neither direction is better; – where there is no outlier to measure at,"
        " or where the two have other outliers. Outliers are those of the backbone without registers, so that the same"
        " places are compared."
    )
    return Table.of("What registers change", header, lines, note if held else "")


def readme_table(results: Results) -> Table:
    """The first table with the measures that say most, at most ten rows."""
    table = glance_table(results, README_ROWS)
    return Table(table.title, table.frame.head(README_MOST), table.note)


def accuracy_table(results: Results) -> Table:
    """A row a run and readout: accuracy of the linear probe on the ID set and on each OOD set."""
    study = results.study
    sets = [study.in_distribution, *study.sets("ood")]
    rows = []
    for run, readout in _shown(results):
        places = [results.top1(readout, dataset) for dataset in sets]
        rows.append((run, readout, *(_marked(results, run, place, TOP1) for place in places)))
    header = ("run", "readout", *(f"{name} top-1" for name in sets))
    return Table.of("Accuracy, % [95 % interval]", header, rows, _marking(results, others=True))


def classifier_table(results: Results, readout: str = "cls") -> Table:
    """The same readout under each classifier that the runs have."""
    sets = [results.study.in_distribution, *results.study.sets("ood")]
    rows = []
    for run in results.study.runs:
        for classifier, label in CLASSIFIERS.items():
            values = [results.value(run, results.top1(readout, dataset, classifier)) for dataset in sets]
            if any(values):
                rows.append((run, label, *(show(value, TOP1) for value in values)))
    header = ("run", "classifier", *(f"{name} top-1" for name in sets))
    return Table.of(f"Other classifiers on the readout {readout}, accuracy, % [95 % interval]", header, rows)


def anomaly_table(results: Results) -> Table:
    """A row a run and readout: AUROC and FPR95 over all anomaly sets, each weighing the same, and FPR95 of each."""
    sets = results.study.sets("anomaly")
    columns = [("auroc", AUROC, ANOMALIES), *(("fpr95", FPR95, name) for name in (ANOMALIES, *sets))]
    rows = []
    for run, readout in _shown(results) if sets else ():
        cells = [_marked(results, run, results.anomaly(name, of, readout), metric) for name, metric, of in columns]
        rows.append((run, readout, *cells))
    header = ("run", "readout", "mean AUROC", "mean FPR95", *(f"{name} FPR95" for name in sets))
    title = f"Anomalies, % [95 % interval]; detector {results.study.detectors[0]}"
    return Table.of(title, header, rows, _marking(results, others=True))


def detector_table(results: Results, readout: str = "cls") -> Table:
    """A row a detector, a column a run: mean AUROC over the anomaly sets."""
    runs = [run for run in results.study.runs if readout in results.readouts(run)]
    rows = []
    for detector in results.study.detectors if results.study.sets("anomaly") else ():
        place = results.anomaly("auroc", ANOMALIES, readout, detector)
        rows.append((detector, *(_marked(results, run, place, AUROC) for run in runs)))
    title = f"Mean AUROC of each detector on the readout {readout}, % [95 % interval]"
    return Table.of(title, ("detector", *runs), rows, _marking(results, others=False))


def difference_table(results: Results) -> Table:
    """The paired differences by which figures are marked, over whole groups of data sets."""
    study, rows = results.study, []
    for run, readout in _shown(results):
        lines = [
            (f"{study.in_distribution} top-1", results.top1(readout, study.in_distribution), TOP1),
            ("OOD top-1", results.top1(readout, OOD), TOP1),
            ("mean AUROC", results.anomaly("auroc", ANOMALIES, readout), AUROC),
            ("mean FPR95", results.anomaly("fpr95", ANOMALIES, readout), FPR95),
        ]
        held = [(run, base) for base in study.bases]
        for each, other in study.held():
            bases = [readout] if readout in results.readouts(other) else study.bases
            held += [(other, base) for base in bases if each == run]
        for other, base in held:
            who = run if other == run else f"{run} − {other}"
            which = readout if readout == base else f"{readout} − {base}"
            for what, place, metric in lines:
                change = results.differences.get((run, other, base, place))
                if change:
                    before = results.value(other, place._replace(readout=base))
                    rows.append((who, which, what, show_change(change, metric), _relative(change, before)))
    note = (
        "The same images, probe seeds and resamples on both sides; p-values, all data sets and detectors:"
        " `metrics/compare/differences.csv`. Not corrected for the number of rows: 1 in 20 leaves out zero by chance."
        " Relative: of the figure that is held against."
    )
    title = f"Paired differences, percentage points [95 % interval]; detector {study.detectors[0]}"
    return Table.of(title, ("run", "readout", "what", "difference", "relative, %"), rows, note)


def _relative(change: Value, before: Value | None) -> Cell | str:
    return Cell(number(100 * change.value / before.value, 1, signed=True)) if before and before.value else NONE


def cost_table(results: Results) -> Table:
    """What a readout costs: channels and parameters of its linear head, and operations of the forward that it is read from."""
    home, rows = results.study.in_distribution, []
    for run, readout in _shown(results):
        of = [
            results.value(run, Place("probe", name, home, readout, "linear")) for name in ("width", "head_parameters")
        ]
        of += [results.verified(run, name) for name in ("gflops", "gflops_without_registers")]
        if any(of):
            rows.append((run, readout, *(show(value, metric) for value, metric in zip(of, COSTS, strict=True))))
    header = ("run", "readout", *(metric.label for metric in COSTS))
    return Table.of("Cost of a readout", header, rows)


def control_table(results: Results) -> Table:
    """What becomes of the outliers on the images of the search: the cure and its controls; no row without outliers."""
    home = results.study.in_distribution
    columns = METRICS["identify"]
    rows = []
    for backbone in results.study.backbones:
        if count := results.searched(backbone, "register_neurons"):
            values = [results.value(backbone, Place("identify", name, home)) for name in columns]
            cells = [show(value, metric) for value, metric in zip(values, columns.values(), strict=True)]
            rows.append((backbone, Cell(f"{count:.0f}"), *cells))
    header = ("backbone", "neurons", *(metric.label for metric in columns.values()))
    note = (
        "The cure moves the register neurons into one test-time register; the last two columns are what must not cure."
    )
    return Table.of("Outlier patches left, %", header, rows, note)


def class_table(results: Results) -> Table:
    """Where several sets are looked at: a row a run and kind of token, a column a set (as Darcet et al. 2024, table 1)."""
    sets, rows = results.study.measured["token_classes"], []
    for run in results.study.runs if len(sets) > 1 else ():
        for name, metric in METRICS["token_classes"].items():
            values = [results.value(run, Place("token_classes", name, dataset)) for dataset in sets]
            if any(values):
                rows.append((run, metric.label, *(show(value, metric) for value in values)))
    return Table.of("Class from one token, top-1 % [95 % interval]", ("run", "token", *sets), rows)


def measurement_table(results: Results, stage: str, dataset: str) -> Table:
    """A row a run, a column a figure of a measurement; runs and columns without a value are left out."""
    places = results.places(stage, dataset)
    runs = [run for run in results.study.runs if any(results.value(run, place) for place in places)]
    rows = []
    for run in runs:
        rows.append((run, *(show(results.value(run, place), METRICS[stage][place.metric]) for place in places)))
    header = ("run", *(METRICS[stage][place.metric].label for place in places))
    return Table.of(f"{TITLES[stage]}, {dataset}", header, rows)


def sinks_table(study: Study, runs: Iterable[str]) -> Table:
    """Why there are sinks in each run, and a verdict; a run that could not be diagnosed has no row."""
    rows = []
    for run in runs:
        table = study.table(run, "verify", study.in_distribution, "diagnosis")
        if table.empty:
            continue
        own = table.iloc[-1]  # the untreated model stands first
        figures = [
            number(scale * own[name], digits) if pd.notna(own[name]) else NONE for name, scale, digits in SINKS.values()
        ]
        channel = f"{own['channel']}: {number(own['channel_ratio'], 1)}"
        rows.append((run, *map(Cell, figures), Cell(channel), own["verdict"]))
    note = (
        "At the places of the untreated model's outliers, or of the largest norm of each image where there are none;"
        " attention, values and rank: heads of the blocks after the detection block. By head: `metrics/runs/<run>/verify/heads.csv`."
    )
    return Table.of("Why there are sinks", ("run", *SINKS, "largest channel: times the median", "verdict"), rows, note)


def register_table(results: Results, dataset: str) -> Table:
    """A row a run and pair of its registers: what their attention maps and their tokens have in common."""
    overlap, cosine = METRICS["attention"]["register_overlap"], METRICS["token_classes"]["register_cosine"]
    rows = []
    for run in results.study.runs:
        for pair in results.study.table(run, "attention", dataset, "registers").itertuples():
            values = (
                Value(pair.overlap, pair.overlap_lo, pair.overlap_hi),
                Value(pair.cosine, pair.cosine_lo, pair.cosine_hi),
            )
            shown = (show(None if isnan(v.value) else v, m) for v, m in zip(values, (overlap, cosine), strict=True))
            rows.append((run, f"{pair.register} and {pair.other}", *shown))
    header = ("run", "registers", "overlap of their maps, %", "cosine")
    return Table.of(f"Registers against each other, {dataset}", header, rows)


def runs_table(results: Results) -> Table:
    """What each run is."""
    study, rows = results.study, []
    for name, run in study.runs.items():
        backbone, count = study.backbones[run["backbone"]], run["num_registers"]
        kind = {"none": "none", "trained": f"{count} trained", "test_time": f"{count} at test time"}[run["registers"]]
        size = f"{backbone['img_size']} px" if backbone.get("img_size") else "its own"
        planted = "planted" if study.planted(run["backbone"]) else "as it came"
        kind = f"{kind}, {study.cure(name)}" if study.cure(name) else kind
        moved = study.neurons(name) if run["registers"] == "test_time" or study.neurons(name) != "selected" else NONE
        held = study.references.get(name, NONE)
        rows.append((name, run["backbone"], str(backbone["source"]), size, planted, kind, moved, held))
    header = ("run", "backbone", "source", "image size", "outliers", "registers", "neurons moved", "held against")
    note = "Measurements on scenes may have an image size of their own: see `params.yaml`."
    return Table.of("Runs", header, rows, note)


def sets_table(results: Results) -> Table:
    """The data sets, what they are for, and the images that figures are of."""
    roles = {
        "id": "in-distribution: probes are trained on it",
        "ood": "the same classes, another look",
        "anomaly": "no class of the ID set",
    }
    study, rows = results.study, []
    counts: dict[str, int] = {}
    for (_, place), value in results.figures.items():
        if place.stage == "evaluate" or place.dataset in study.scenes:
            counts[place.dataset] = max(counts.get(place.dataset, 0), value.n or 0)
    for name, entry in (*study.datasets.items(), *study.scenes.items()):
        stages = ", ".join(stage for stage, names in study.measured.items() if name in names) or "pictures"
        n = Cell(str(counts[name])) if counts.get(name) else NONE
        rows.append((name, str(entry["source"]), roles[entry["role"]] if "role" in entry else stages, n))
    return Table.of("Data sets", ("data set", "source", "what for", "test images"), rows)


def _at_a_glance(results: Results) -> Iterator[tuple[Place, Metric]]:
    """The measures of the first table that some run has, in its order."""
    study = results.study
    order = ("verify", *MEASUREMENTS)
    places: Iterable[Place] = [place for stage in order for place in results.places(stage)]
    places = [*places, *(results.top1(readout, study.in_distribution) for readout in AT_A_GLANCE)]
    for place in places:
        metric = METRICS[place.stage][place.metric]
        if metric.glance and any(_value(results, run, place) for run in study.runs):
            yield place, metric


def _value(results: Results, run: str, place: Place) -> Value | None:
    """A run's figure; of outliers none where its backbone shows none."""
    outliers = (place.stage, place.metric) == ("verify", "outlier_fraction")
    return results.outliers(run) if outliers else results.value(run, place)


def _shown(results: Results) -> Iterator[tuple[str, str]]:
    """(run, readout) of the rows about readouts."""
    for run in results.study.runs:
        wanted = results.study.readouts
        yield from ((run, readout) for readout in results.readouts(run) if wanted is None or readout in wanted)


def _marked(results: Results, run: str, place: Place, metric: Metric) -> Cell | str:
    """The figure, its interval and its mark."""
    change = results.change(run, place, None if place.readout == "cls" else "cls")
    return show(results.value(run, place), metric, metric.better * change.side if change else 0)


def _marking(results: Results, others: bool) -> str:
    """What ▲ and ▼ mean in these rows, which may have other readouts than CLS."""
    shown = list(_shown(results))
    held = [f"{run} against {other}" for run, other in results.study.references.items() if (run, "cls") in shown]
    against = ["cls: " + ", ".join(held)] if held else []
    against += ["other readouts: against cls of the same run"] if others and any(r != "cls" for _, r in shown) else []
    if not against:
        return ""
    return f"▲ better, ▼ worse: the 95 % interval of the paired difference leaves out zero ({'; '.join(against)})."


def _images(values: Iterable[Value | None]) -> Cell | str:
    """How many images are behind the figures of a row; fewer where a run has none with outliers."""
    counts = sorted({value.n for value in values if value is not None and value.n is not None})
    return Cell("–".join(dict.fromkeys((str(counts[0]), str(counts[-1]))))) if counts else NONE
