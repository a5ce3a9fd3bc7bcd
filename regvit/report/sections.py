"""The parts of the report, each from what there is in metrics/: a measurement that was not made has no part."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from regvit.report.compare import Check, Table
from regvit.report.comparisons import Columns, Measurements, Value, datasets_of, numbers, value_of
from regvit.report.measurements import measurement_table
from regvit.report.page import (
    Section,
    Shown,
    check_list,
    code,
    definitions,
    figures,
    heading,
    page,
    paragraph,
    pictures,
    slug,
    table,
)
from regvit.report.plots import (
    Curve,
    plot_histogram,
    plot_layers,
    plot_norms,
    plot_places,
    plot_points,
    plot_scores,
    plot_settings,
)
from regvit.report.sliders import WHAT, Comparison, Side, sliders
from regvit.report.sweeps import Kept
from regvit.report.tables import (
    anatomy_table,
    attention_table,
    corloc_table,
    depth_table,
    runs_table,
    segmentation_table,
    sets_table,
    token_table,
    zeroshot_table,
)

TITLE = "Register neurons and what they change"
ALL_PICTURES = 180_000  # bytes of attention maps and boxes together: the page of a few runs stays below 1 MB
LARGEST_PICTURE = 30_000
SEGMENTATION = {
    ("miou",): "mIoU",
    ("accuracy_at_outliers",): "accuracy at outliers",
    ("accuracy_elsewhere",): "accuracy elsewhere",
}
DEPTH = {("rmse",): "RMSE", ("rmse_at_outliers",): "RMSE at outliers", ("rmse_elsewhere",): "RMSE elsewhere"}
WORDS = (
    ("outlier", "a patch token whose norm is far above the others'; decided in one block, the detection layer"),
    ("register neuron", "an MLP neuron (input of `mlp.fc2`) that writes that norm"),
    (
        "test-time register",
        "an untrained zero token that gets the register neurons' activation, which the patches lose",
    ),
    ("attribution", "share of the outliers' excess over other patches that a neuron writes"),
    ("run", "a backbone with a variant of registers"),
    ("planted", "register neurons put into a backbone on purpose, so that the truth is known"),
    ("readout", "what a probe sees of the tokens: CLS, mean of registers or patches, or pairs of them"),
    ("ID, OOD, anomaly", "images as in training; the same classes drawn otherwise; images of no class"),
    ("FPR95", "share of anomalies accepted where 95 % of the in-distribution images are accepted"),
    ("coherence", "Moran's I of an attention map: 1 where neighbours are alike, 0 for scattered dots"),
    ("object AUROC", "how often a patch on an object gets more attention than one beside it"),
    ("CorLoc", "share of images in which the box that is found overlaps a true one by half or more"),
    ("mIoU", "intersection over union of predicted and true pixels, mean over the classes"),
    ("RMSE", "root of the mean squared error, of depth in metres, mean over images"),
)


@dataclass(frozen=True)
class Search:
    """What the search for register neurons saw in a backbone: its metrics, and the columns of its tables."""

    threshold: float | None
    norms: Mapping[str, Sequence[float]]
    histogram: Mapping[str, Sequence[float]]
    scores: Mapping[str, Sequence[float]]


@dataclass(frozen=True)
class Material:
    """What the report is made of.

    Args:
        runs: in the order of the tables.
        backbones, datasets, scenes: their entries in params.yaml, by name.
        in_distribution: the ID set.
        seed: of everything.
        tables: comparison tables (`compare`).
        checks: self-checks.
        searches: by backbone.
        folder: metrics/, where the pictures are.
        sweeps: tables that were kept.
    """

    runs: Sequence[Measurements]
    backbones: Mapping[str, Mapping]
    datasets: Mapping[str, Mapping]
    scenes: Mapping[str, Mapping]
    in_distribution: str
    seed: int
    tables: Sequence[Table] = ()
    checks: Sequence[Check] = ()
    searches: Mapping[str, Search] = field(default_factory=dict)
    folder: Path = Path("metrics")
    sweeps: Sequence[Kept] = ()

    @property
    def first_shown(self) -> int:
        """Index of the run whose pictures come first: the first that is held against another and has registers."""
        held = (i for i, run in enumerate(self.runs) if run.run.reference and run.run.registers != "none")
        return next(held, 0)


def report(of: Material) -> str:
    """The whole page."""
    drawn = list(_all_pictures(of))
    limit = min(LARGEST_PICTURE, ALL_PICTURES // max(1, len(drawn)))
    parts = [
        Section("Before and after", before_and_after(of)),
        Section("What registers change", at_a_glance(of)),
        Section("Self-checks", check_list(of.checks)),
        Section("What was run", what_was_run(of)),
        Section("Outliers and their neurons", outliers(of)),
        Section("Attention", attention(of, limit)),
        Section("What single tokens know", tokens(of)),
        Section("Object discovery", discovery(of, limit)),
        Section("Segmentation", _dense(of, "segment", segmentation_table, SEGMENTATION, 100, "%")),
        Section("Depth", _dense(of, "depth", depth_table, DEPTH, 1, "m")),
        Section("Zero-shot classification", zeroshot(of)),
        Section("Classification and anomalies", classification(of)),
        Section("Sweeps", sweeps(of)),
        Section("Make it again", reproduce()),
        Section("Words", definitions(WORDS)),
    ]
    return page(TITLE, lead(of), parts)


def lead(of: Material) -> str:
    """What the page is about, and whether the run passed its own checks."""
    planted = any("plant" in of.backbones[run.backbone] for run in of.runs)
    names = ", ".join(run.name for run in of.runs)
    text = f"Runs: {names}. Trained on {of.in_distribution}; seed {of.seed}."
    if planted:
        text += (
            " Some outliers are planted on purpose, so that it is known what has to be found and what has to come back."
        )
    failed = sum(not check.passed for check in of.checks)
    verdict = (
        f"{failed} of {len(of.checks)} self-checks failed." if failed else f"All {len(of.checks)} self-checks hold."
    )
    mark = f'<p class="{"fail" if failed else "pass"}">{verdict}</p>' if of.checks else ""
    return paragraph(text) + mark


def at_a_glance(of: Material) -> str:
    return table(measurement_table(of.runs, of.in_distribution, of.seed), titled=False, stacked=True)


def what_was_run(of: Material) -> str:
    entries = {"datasets": of.datasets, "scenes": of.scenes, "in_distribution": of.in_distribution}
    return table(runs_table(of.runs, of.backbones)) + table(sets_table(entries, of.runs))


def before_and_after(of: Material) -> str:
    """Norms, attention and features of the same images in two models, one over the other."""
    shown = list(_compared(of))
    if not shown:
        return ""
    text = (
        "The same images in two models: left of the line the first, right of it the second. Move it with the slider, or"
        " on a map itself."
    )
    note = (
        "Patch norms: logarithmic, bright from the 99 % quantile of the patches that are no outliers on; outliers in"
        " cyan. CLS attention: mean over heads and the blocks after the register neurons; the scale of each image ends where its patches that are no outliers"
        " end. Features: the first three principal components of the patch tokens as red, green and blue, fitted once, on"
        " patches of the backbone before planting and without registers that are no outliers; so the same colour is the"
        " same feature in all images and in all runs of one backbone."
    )
    first = of.runs[of.first_shown].name
    chosen = [i for i, (run, each) in enumerate(shown) if run == first and each.before]
    return (
        paragraph(text)
        + sliders("models", [each for _, each in shown], min(chosen, default=0))
        + paragraph(note, "note")
    )


def outliers(of: Material) -> str:
    """What the search saw in each backbone, and where outliers sit."""
    parts = []
    for name, search in of.searches.items():
        content = [("Norms of the patches by block.", plot_norms(search.norms))]
        if search.scores["rank"]:
            content += [
                ("With and without a test-time register.", plot_histogram(search.histogram, search.threshold)),
                ("Share of the outliers' excess that each neuron writes, best first.", plot_scores(search.scores)),
            ]
        else:
            content[0] = ("Norms of the patches by block: no outliers, so no neurons to show.", content[0][1])
        content += [
            (f"Where the outliers of {dataset} sit in the image.", plot_places(share))
            for dataset, share in _places(of, name)
        ]
        parts.append(heading(f"Backbone {name}") + figures(content))
    for name in datasets_of(of.runs, "tokens"):
        parts.append(table(anatomy_table(of.runs, name)))
        curves = _curves(of, "tokens", name, "norms", "q99")
        caption = "Norm that 99 % of the patches stay below, by block."
        parts.append(figures([(caption, plot_layers(curves, "L2 norm", log=True))] if curves else []))
    return "".join(parts)


def attention(of: Material, limit: int) -> str:
    """By block, all runs together; and the maps."""
    parts = []
    for name in datasets_of(of.runs, "attention"):
        parts.append(table(attention_table(of.runs, name)))
        plots = []
        for column, label, caption in (
            ("entropy", "entropy, nats", "How widely CLS looks."),
            ("on_outliers", "share on outliers", "Attention of CLS that outliers get."),
            ("on_registers", "share on registers", "Attention of CLS that registers get."),
            ("morans_i", "Moran's I", "Coherence: whether neighbouring patches get alike attention."),
            ("object_auroc", "AUROC", "Whether patches on objects get more attention than others."),
        ):
            curves = _curves(of, "attention", name, "layers", column)
            if any(any(value == value and value != 0 for value in curve.values) for curve in curves.values()):
                plots.append((caption, plot_layers(curves, label)))
        parts.append(figures(plots))
        shown = list(_drawn(of, "attention", name, "maps.png", f"attention maps of {name}"))
        if shown:
            parts.append(heading(f"Attention maps, {name}"))
            parts.append(paragraph("Mean over heads of the later blocks; each map on a scale of its own."))
            parts.append(pictures(f"maps-{slug(name)}", "run", shown, limit, _first(of, shown)))
    return "".join(parts)


def tokens(of: Material) -> str:
    """Position, pixels and class read from one token."""
    patch = {"normal": "normal patch", "outlier": "outlier patch"}
    image = {
        "cls": "CLS",
        "register": "register",
        "normal_beside": "normal patch, images with outliers",  # others are easier or harder to class
        "outlier": "outlier patch",
    }
    parts = []
    for name in datasets_of(of.runs, "tokens"):
        parts.append(table(token_table(of.runs, name)))
        plots = []
        for what, key, scale, label, kinds, caption in (
            ("position", "top1", 100, "top-1, %", patch, "Position of the patch, read from the token."),
            ("pixels", "l2", 1, "L2 error", patch, "Pixels of the patch, read from the token; less is better."),
            ("class", "top1", 100, "top-1, %", image, "Class of the image, read from one token."),
        ):
            rows = {(what, kind, key): name for kind, name in kinds.items()}
            plot = _points(of, rows, _value("tokens", name), label, scale)
            plots += [(caption, plot)] if plot else []
        parts.append(figures(plots))
    return "".join(parts)


def discovery(of: Material, limit: int) -> str:
    """CorLoc by feature, and the boxes on images."""
    parts = []
    for name in datasets_of(of.runs, "discover"):
        parts.append(table(corloc_table(of.runs, name)))
        kinds = dict.fromkeys(kind for run in of.runs for kind in run.of("discover", name, "features"))
        rows = {("features", kind, "corloc"): kind for kind in kinds} | {
            ("mean_over_features", "corloc"): "mean over features"
        }
        plot = _points(of, rows, _value("discover", name), "CorLoc, %", 100)
        parts.append(figures([("Each feature with its own best setting.", plot)] if plot else []))
        shown = list(_drawn(of, "discover", name, "boxes.png", f"images of {name} with true and found boxes"))
        if shown:
            parts.append(heading(f"Boxes, {name}"))
            parts.append(paragraph("Green: true boxes. Red: what is found."))
            parts.append(pictures(f"boxes-{slug(name)}", "run", shown, limit, _first(of, shown)))
    return "".join(parts)


def _dense(
    of: Material, stage: str, tabled: Callable[..., Table], rows: Mapping[tuple[str], str], scale: float, unit: str
) -> str:
    """A table and a plot for each data set."""
    parts = []
    for name in datasets_of(of.runs, stage):
        parts.append(table(tabled(of.runs, name)))
        plot = _points(of, rows, _value(stage, name), unit, scale)
        parts.append(figures([("Elsewhere: other patches of the images with outliers.", plot)] if plot else []))
    return "".join(parts)


def zeroshot(of: Material) -> str:
    return "".join(table(zeroshot_table(of.runs, name)) for name in datasets_of(of.runs, "zeroshot"))


def classification(of: Material) -> str:
    """The comparison tables, and accuracies of the CLS readout."""
    ood = [name for name, entry in of.datasets.items() if entry["role"] == "ood"]
    rows = {(of.in_distribution, "id"): of.in_distribution} | {(name, "ood"): name for name in ood}

    def top1(run: Measurements, place: tuple[str, str]) -> Value | None:
        values = run.run.evaluate.get("cls", {}).get(place[1], {})
        return value_of(values if place[1] == "id" else values.get(place[0], {}), "top1")

    plot = _points(of, rows, top1, "top-1, %", 100)
    drawn = figures([("Linear probe on CLS.", plot)] if plot else [])
    first, *others = [table(each) for each in of.tables] or [""]
    return first + drawn + "".join(others)


def sweeps(of: Material) -> str:
    """The curves of each sweep whose table was kept."""
    parts = []
    for each in of.sweeps:
        plots = [(column, plot_settings(each.points, values, column)) for column, values in each.values.items()]
        parts.append(heading(f"Sweep {each.name}") + paragraph(each.caption) + figures(plots))
    note = (
        "Each setting is an experiment, a whole run of the stages that it concerns; points with 95 % intervals over the test"
        " images. `python -m regvit.pipeline.sweep_commands run <name>`, then `table <name>`, measures them again."
    )
    return "".join(parts) + paragraph(note, "note") if parts else ""


def reproduce() -> str:
    steps = code(
        "make repro                       # the environment and the whole pipeline; what is unchanged does not run again\n"
        "python -m regvit.pipeline.compare_runs         # these tables in the terminal\n"
        "dvc repro report                 # this page\n"
        "dvc exp run -S probe.steps=2000  # a change tried\n"
        "dvc metrics diff                 # what it changed"
    )
    text = (
        "In the repository that this page lies in. All that can change a result stands in `params.yaml` and `dvc.lock`."
    )
    links = (
        ("../README.md", "README"),
        ("../docs/method.md", "the method with its formulas"),
        ("../docs/deviations.md", "deviations from the papers' code"),
        ("../params.yaml", "params.yaml"),
    )
    named = " · ".join(f'<a href="{place}">{label}</a>' for place, label in links)
    return paragraph(text) + steps + f'<p class="lead">{named}</p>'


def _value(stage: str, dataset: str) -> Callable[[Measurements, tuple[str, ...]], Value | None]:
    """Reads a figure of a run by its path in the metrics."""
    return lambda run, path: value_of(run.of(stage, dataset, *path[:-1]), path[-1])


def _points(of: Material, rows: Mapping, value: Callable[..., Value | None], label: str, scale: float) -> str:
    """A dot plot of the runs; rows that no run has are left out, and nothing comes back where none is left.

    Args:
        rows: by what `value` takes besides the run, their labels.
    """
    found = {row: [value(run, row) for run in of.runs] for row in rows}
    kept = [row for row, values in found.items() if any(each is not None for each in values)]
    if not kept:
        return ""
    series = {run.name: [found[row][i] for row in kept] for i, run in enumerate(of.runs)}
    return plot_points([rows[row] for row in kept], series, label, scale)


def _curves(of: Material, stage: str, dataset: str, name: str, column: str) -> dict[str, Curve]:
    """A column by block of every run; empty where a run has none."""
    curves = {}
    for run in of.runs:
        columns: Columns = run.tables.get((stage, dataset, name), {})
        if not columns.get(column):
            curves[run.name] = Curve((), (), (), ())
            continue
        values = {key: numbers(columns[key]) for key in ("layer", column)}
        ends = [
            numbers(columns[f"{column}{end}"]) if f"{column}{end}" in columns else values[column]
            for end in ("_lo", "_hi")
        ]
        curves[run.name] = Curve(values["layer"], values[column], *ends)
    return curves if any(len(curve.values) for curve in curves.values()) else {}


def _places(of: Material, backbone: str) -> Iterator[tuple[str, Sequence[float]]]:
    """Where outliers of a backbone sit, for each data set on which that was measured: the same for all its runs."""
    for dataset in datasets_of(of.runs, "tokens"):
        for run in of.runs:
            share = numbers(run.tables.get(("tokens", dataset, "positions"), {}).get("share", ()))
            if run.backbone == backbone and share.any():
                yield dataset, share
                break


def _compared(of: Material) -> Iterator[tuple[str, Comparison]]:
    """Of each run: its maps over those of its backbone without registers, over those before planting, or, where the run
    is its backbone as it came, over those of the run that it is held against."""
    names = {run.name: run for run in of.runs}
    for run in of.runs:
        folder = of.folder / "verify" / run.name
        images = folder / "images.jpg"
        if not images.is_file():
            continue
        after = _side(folder, run.name, run.name)
        befores = [
            _side(folder, model, label)
            for model, label in _untreated_names(of, run).items()
            if model != run.name and (folder / f"norms-{model}.png").is_file()
        ]
        other = names.get(run.run.reference or "")
        elsewhere = of.folder / "verify" / other.name if other else folder
        if not befores and other and (elsewhere / "images.jpg").is_file():
            befores = [_side(elsewhere, other.name, other.name)]
        for before in befores or [None]:
            yield run.name, Comparison(images, before, after)


def _untreated_names(of: Material, run: Measurements) -> dict[str, str]:
    """How the models that `verify` drew beside a run's are called: by the run that they are, if one is."""
    plain = next((each for each in of.runs if each.backbone == run.backbone and each.untouched), None)
    before = next((each for each in of.runs if plain and each.name == plain.run.reference), None)
    as_it_came = before is not None and "plant" not in of.backbones[before.backbone]
    return {
        "original": plain.name if plain and plain is not run else "without registers",
        "intact": before.name if as_it_came else "before planting",
    }


def _side(folder: Path, model: str, label: str) -> Side:
    strips = {what: folder / f"{what}-{model}.png" for what in WHAT}
    return Side(label, {what: path for what, path in strips.items() if path.is_file()})


def _drawn(of: Material, stage: str, dataset: str, file: str, what: str) -> Iterator[Shown]:
    """Pictures that a stage left for the runs that it measured."""
    for run in of.runs:
        path = of.folder / stage / run.name / dataset / file
        if run.of(stage, dataset) and path.is_file():
            yield Shown(run.name, path, f"{what} in run {run.name}", run.run.reference)


def _all_pictures(of: Material) -> Iterator[Shown]:
    for stage, file in (("attention", "maps.png"), ("discover", "boxes.png")):
        for dataset in datasets_of(of.runs, stage):
            yield from _drawn(of, stage, dataset, file, "")


def _first(of: Material, shown: Sequence[Shown]) -> int:
    names = [each.name for each in shown]
    wanted = of.runs[of.first_shown].name
    return names.index(wanted) if wanted in names else 0
