"""The tables of the report about each measurement; those of accuracy and anomalies are in `compare`."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

from regvit.report.compare import Table
from regvit.report.comparisons import Measurements, Value, value_of
from regvit.report.measurements import show, show_change

Column = tuple[str, float, int, Callable[[Measurements], Value | None]]  # heading, scale, digits, value


def runs_table(runs: Sequence[Measurements], backbones: Mapping[str, Mapping]) -> Table:
    """What each run is.

    Args:
        backbones: their entries in params.yaml, by name.
    """
    rows = []
    for run in runs:
        entry, of = backbones[run.backbone], run.run
        kind = {
            "none": "none",
            "trained": f"{of.num_registers} trained",
            "test_time": f"{of.num_registers} at test time",
        }
        planted = "planted" if "plant" in entry else "as it came"
        size = f"{entry['img_size']} px" if entry.get("img_size") else "its own"
        model = (run.backbone, str(entry["source"]), size, planted)
        neurons = "–" if run.untouched or of.registers == "trained" else of.neurons
        rows.append((run.name, *model, kind[of.registers], neurons, of.reference or "–"))
    header = ("run", "backbone", "source", "image size", "outliers", "registers", "neurons moved", "held against")
    note = "Measurements on scenes may have an image size of their own: see `img_size` in params.yaml."
    return Table("Runs", header, tuple(rows), note)


def sets_table(params: Mapping, runs: Sequence[Measurements]) -> Table:
    """The data sets, and what they are for.

    Args:
        params: of the pipeline.
    """
    roles = {"id": "in-distribution: probes are trained on it", "ood": "the same classes, another look", "anomaly": "no class of the ID set"}  # fmt: skip
    rows = []
    for name, entry in params["datasets"].items():
        rows.append((name, str(entry["source"]), roles[entry["role"]], _count(runs, name, params["in_distribution"])))
    for name, entry in params["scenes"].items():
        stages = [
            stage for stage in dict.fromkeys(s for run in runs for s in run.found) if _measured(runs, stage, name)
        ]
        counts = [run.of(stage, name).get("n") for run in runs for stage in stages]
        counts += [run.of("tokens", name, "anatomy").get("n") for run in runs]
        known = [n for n in counts if n is not None]
        rows.append((name, str(entry["source"]), ", ".join(stages) or "pictures", str(max(known)) if known else "–"))
    return Table("Data sets", ("data set", "source", "what for", "test images"), tuple(rows))


def attention_table(runs: Sequence[Measurements], name: str) -> Table:
    """Attention of the first query, CLS where there is one, in the later blocks: mean over heads."""

    def column(label: str, key: str, scale: float, digits: int) -> Column:
        return label, scale, digits, lambda run: value_of(run.of("attention", name, "heads"), key)

    return _by_run(
        f"CLS attention in the later blocks, {name}",
        runs,
        [
            column("entropy, nats", "entropy", 1, 2),
            column("on outliers, %", "on_outliers", 100, 1),
            column("on registers, %", "on_registers", 100, 1),
            column("on CLS, %", "on_cls", 100, 1),
            column("coherence (Moran's I)", "morans_i", 1, 3),
            column("on objects, %", "object_mass", 100, 1),
            column("object AUROC, %", "object_auroc", 100, 1),
        ],
    )


def token_table(runs: Sequence[Measurements], name: str) -> Table:
    """What is read from a single token, a row a run and a kind of token."""
    kinds = {
        "cls": "CLS",
        "register": "register",
        "normal": "normal patch",
        "normal_beside": "normal patch, images with outliers",
        "outlier": "outlier patch",
        "difference": "outlier − normal, same images",
    }
    probes = (
        ("position", "top1", 100, 1),
        ("position", "distance", 1, 2),
        ("pixels", "l2", 1, 2),
        ("class", "top1", 100, 1),
    )
    rows = []
    for run in runs:
        for kind, label in kinds.items():
            cells = []
            for what, key, scale, digits in probes:
                value = value_of(run.of("tokens", name, what, kind), key)
                cells.append(
                    show_change(value, scale, digits, 0) if kind == "difference" else show(value, scale, digits)
                )
            if any(cell.strip() != "–" for cell in cells):
                rows.append((run.name, label, *cells))
    return Table(
        f"What one token tells, {name}",
        ("run", "token", "position top-1, %", "off by, patches", "pixels, L2 error", "class top-1, %"),
        tuple(rows),
        "Linear probes on single tokens of the last layer. The class is read on the ID set, from one token of a kind drawn at random.",
    )


def anatomy_table(runs: Sequence[Measurements], name: str) -> Table:
    """Where outliers sit, for runs whose backbone has some."""
    runs = [run for run in runs if run.of("tokens", name, "anatomy").get("threshold") is not None]

    def column(label: str, key: str, scale: float, digits: int) -> Column:
        return label, scale, digits, lambda run: value_of(run.of("tokens", name, "anatomy"), key)

    return _by_run(
        f"Where outliers sit, {name}",
        runs,
        [
            column("patches over the threshold, %", "over_threshold", 100, 2),
            column("places that are outliers untreated, %", "outlier_fraction", 100, 2),
            column("of them on the border, %", "outlier_on_border", 100, 1),
            column("cosine to neighbours, outlier", "neighbour_cosine_outlier", 1, 3),
            column("normal patch", "neighbour_cosine_normal", 1, 3),
            column(
                "outliers among the quarter of patches of least information, %", "outlier_on_low_information", 100, 1
            ),
            column("two modes of log norms apart (Ashman's D; > 2: two)", "ashman_d", 1, 1),
            column("outliers appear in block", "appears_in_layer", 1, 0),
        ],
    )


def corloc_table(runs: Sequence[Measurements], name: str) -> Table:
    """CorLoc by feature, each with its own best setting, beside the published setting and a box from the attention."""
    kinds = list(dict.fromkeys(kind for run in runs for kind in run.of("discover", name, "features")))

    def column(label: str, *path: str) -> Column:
        return label, 100, 1, lambda run: value_of(run.of("discover", name, *path), "corloc")

    columns = [column("chosen setting"), column("mean over features", "mean_over_features")]
    columns += [column(kind, "features", kind) for kind in kinds]
    columns += [column("published setting", "published"), column("box of CLS attention", "dino_seg")]
    table = _by_run(f"CorLoc, % [95 % interval], {name}", runs, columns)
    chosen = (f"{run.name}: {_setting(run.of('discover', name, 'chosen'))}" for run in runs if run.of("discover", name))
    note = f"Chosen on images outside the test split. {'; '.join(chosen)}."
    return Table(table.title, table.header, table.rows, note if table.rows else "")


def segmentation_table(runs: Sequence[Measurements], name: str) -> Table:
    """Classes of pixels from patch tokens by a linear layer."""

    def column(label: str, key: str) -> Column:
        return label, 100, 1, lambda run: value_of(run.of("segment", name), key)

    columns = [
        column("mIoU", "miou"),
        column("pixel accuracy", "accuracy"),
        column("at outliers", "accuracy_at_outliers"),
        column("elsewhere, same images", "accuracy_elsewhere"),
    ]
    return _by_run(f"Segmentation, % [95 % interval], {name}", runs, columns)


def depth_table(runs: Sequence[Measurements], name: str) -> Table:
    """Depth from patch tokens by a linear layer on bins."""

    def column(label: str, key: str, scale: float, digits: int) -> Column:
        return label, scale, digits, lambda run: value_of(run.of("depth", name), key)

    columns = [
        column("RMSE, m", "rmse", 1, 3),
        column("at outliers, m", "rmse_at_outliers", 1, 3),
        column("elsewhere, same images, m", "rmse_elsewhere", 1, 3),
        column("relative error, %", "abs_rel", 100, 1),
        column("δ < 1.25, %", "delta1", 100, 1),
    ]
    return _by_run(f"Depth, {name}", runs, columns)


def zeroshot_table(runs: Sequence[Measurements], name: str) -> Table:
    """Zero-shot classification; gain: paired, against the same backbone without registers."""

    def column(label: str, key: str) -> Column:
        return label, 100, 1, lambda run: value_of(run.of("zeroshot", name), key)

    columns = [column("top-1", "top1"), column("top-5", "top5"), column("untreated top-1", "untreated_top1")]
    return _by_run(f"Zero-shot, % [95 % interval], {name}", runs, [*columns, column("gain", "gain")])


def _by_run(title: str, runs: Sequence[Measurements], columns: Sequence[Column]) -> Table:
    """A row a run; runs and columns without a value are left out."""
    values = {run.name: [value(run) for _, _, _, value in columns] for run in runs}
    kept = [i for i in range(len(columns)) if any(row[i] is not None for row in values.values())]
    rows = [
        (name, *(show(row[i], columns[i][1], columns[i][2]) for i in kept))
        for name, row in values.items()
        if any(value is not None for value in row)
    ]
    return Table(title, ("run", *(columns[i][0] for i in kept)), tuple(rows))


def _setting(chosen: Mapping) -> str:
    whitened = ", normalised" if chosen.get("normalised") else ""
    return f"{chosen.get('kind')} of block {chosen.get('layer')}{whitened}, bias {chosen.get('bias')}"


def _measured(runs: Sequence[Measurements], stage: str, name: str) -> bool:
    return any(run.of(stage, name) for run in runs)


def _count(runs: Sequence[Measurements], name: str, home: str) -> str:
    """Number of test images that a readout was measured on."""
    for run in runs:
        for values in run.run.evaluate.values():
            if name == home:
                return str(values["id"]["n"])
            if name in values["ood"]:
                return str(values["ood"][name]["n"])
            for detector in values["anomaly"].get(name, {}).values():
                return str(detector["n"])
    return "–"
