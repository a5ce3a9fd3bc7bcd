"""One HTML page about the runs: tables, self-checks, plots and pictures, with nothing to load, in light and dark.

The bytes depend on the tables and pictures alone: no date, no random identifier, no version. What is said and how it looks
stands in `templates/`; every text that comes in is escaped there. A measurement that was not made has no part.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import pandas as pd
from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup, escape

from regvit.report.catalogue import METRICS
from regvit.report.checks import findings, self_checks, summary_line
from regvit.report.comparison import (
    comparison,
    measurement_table,
    register_table,
    runs_table,
    sets_table,
    sinks_table,
)
from regvit.report.pictures import Drawn, comparisons, photo_bytes, picture, tiles
from regvit.report.plots import (
    plot_distributions,
    plot_histogram,
    plot_layers,
    plot_norms,
    plot_places,
    plot_points,
    plot_scores,
)
from regvit.report.results import Results
from regvit.report.tables import Table

TITLE = "Register neurons and what they change"
MOST_PANES = 12  # of pictures to choose from
LONG = 24  # rows: a longer table is folded
LARGE = 700  # pixels of width: not shrunk on a phone, but scrolled
ALL_PICTURES = 180_000  # bytes of attention maps and boxes together: the page of a few runs stays below 1 MB
LARGEST_PICTURE = 30_000
STAGE_TITLES = {
    "attention": "Attention",
    "tokens": "What single tokens know",
    "token_classes": "Class from one token",
    "discover": "Object discovery",
    "discover_published": "Object discovery as published",
    "segment": "Segmentation",
    "depth": "Depth",
    "hummingbird": "Segmentation in context",
    "correspond": "Correspondence",
    "retrieve": "Retrieval",
    "zeroshot": "Zero-shot classification",
    "zeroshot_segment": "Zero-shot segmentation",
}
CURVES = {  # of stage, table: (column, label, caption), of which those are drawn that say something
    ("attention", "layers"): (
        ("entropy", "entropy, nats", "How widely CLS looks."),
        ("on_outliers", "share on outliers", "Attention of CLS that outliers get."),
        ("on_registers", "share on registers", "Attention of CLS that registers get."),
        ("morans_i", "Moran's I", "Coherence: whether neighbouring patches get alike attention."),
        ("object_auroc", "AUROC", "Whether patches on objects get more attention than others."),
    ),
    ("tokens", "norms"): (("q99", "L2 norm", "Norm that 99 % of the patches stay below, by block."),),
}
POINTS = {  # of a stage: (metrics by pattern, label of the axis, caption)
    "tokens": (
        ("position_top1", "top-1, %", "Position of the patch, read from the token."),
        ("pixels_l2", "L2 error", "Pixels of the patch, read from the token; less is better."),
    ),
    "token_classes": (("class_top1", "top-1, %", "Class of the image, read from one token of a kind."),),
    "discover": (("corloc_(?!published|dino|token_cut)", "CorLoc, %", "Each feature with its own best setting."),),
    "segment": (("miou$|pixel_accuracy_", "%", "Segmentation. Elsewhere: other patches of the images with outliers."),),
    "depth": (("rmse", "m", "Depth. Elsewhere: other patches of the images with outliers."),),
    "hummingbird": (
        ("miou$|pixel_accuracy_", "%", "In context. Elsewhere: other patches of the images with outliers."),
    ),
    "correspond": (("pck", "%", "Points found. Elsewhere: other patches of the first images with outliers."),),
    "retrieve": (("map", "%", "Mean average precision of each readout."),),
}
DRAWN = {  # of a stage: file, heading, what is to be seen
    "attention": (
        ("maps.png", "Attention maps", "Mean over heads of the later blocks; each map on a scale of its own."),
        ("heads.png", "Attention by head", "Last block, a column a head; each map on a scale of its own."),
    ),
    "discover": (("boxes.png", "Boxes", "Green: true boxes. Red: what is found."),),
    "discover_published": (("boxes.png", "Boxes as published", "Green: true boxes. Red: LOST. Blue: TokenCut."),),
    "hummingbird": (("masks.png", "Masks", "Image, true classes, classes found."),),
    "zeroshot_segment": (("masks.png", "Masks", "Image, true classes, classes found by their names."),),
    "correspond": (
        ("matches.png", "Matches", "Green: found within a patch. Red: elsewhere. Half of them at outliers."),
    ),
}


@dataclass(frozen=True)
class Plot:
    source: str
    caption: str


@dataclass(frozen=True)
class Shown:
    """The picture of a run, and the run whose picture of the same size lies under it, if any."""

    run: str
    drawn: Drawn
    under: str | None = None

    @property
    def large(self) -> bool:
        return self.drawn.width > LARGE


@dataclass(frozen=True)
class Block:
    """A piece of a part: what there is of it is shown in this order."""

    heading: str = ""
    text: str = ""
    table: Table | None = None
    plots: Sequence[Plot] = ()
    pictures: Sequence[Shown] = ()
    key: str = ""  # of the pictures, once a page
    chosen: int = 0  # picture that is shown first


@dataclass(frozen=True)
class Part:
    """A part of the page: its title, its blocks, and the macro of the template that draws it."""

    title: str
    blocks: Sequence[Block] = field(default_factory=tuple)
    macro: str = "blocks"


def report(results: Results) -> str:
    """The whole page."""
    study = results.study
    checks, (glance, *tables) = self_checks(results), comparison(results) or [Table.of("", (), ())]
    compared = comparisons(study)
    first = _first_run(results)
    chosen = [i for i, each in enumerate(compared) if each.run == first and each.before]
    photos = photo_bytes(len(compared), max((len(tiles(each.images)) for each in compared), default=1))
    parts = [
        Part("Before and after", compared, "sliders"),
        Part("What registers change", [Block(table=glance)] if glance else [], "glance"),
        Part("Self-checks", [Block()], "checks"),
        Part("What was run", [Block(table=runs_table(results)), Block(table=sets_table(results))]),
        Part("Outliers and their neurons", list(_search_blocks(results))),
        *(Part(title, list(_stage_blocks(results, stage))) for stage, title in STAGE_TITLES.items()),
        Part("Classification and anomalies", list(_classification(results, tables))),
        Part("Make it again", [Block()], "again"),
        Part("Words", [Block()], "words"),
    ]
    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent / "templates"),
        autoescape=True,
        trim_blocks=True,
        lstrip_blocks=True,
        undefined=StrictUndefined,
    )
    environment.filters |= {"prose": prose, "slug": slug}
    return environment.get_template("page.html").render(
        title=TITLE,
        study=study,
        planted=any(study.planted(run["backbone"]) for run in study.runs.values()),
        parts=[part for part in parts if part.blocks],
        findings=findings(results),
        checks=checks,
        verdict=summary_line(checks),
        failed=not all(check.passed for check in checks),
        most_panes=MOST_PANES,
        long=LONG,
        chosen=min(chosen, default=0),
        photo_bytes=photos,
    )


def prose(text: str) -> Markup:
    """Plain text, in which `…` is code."""
    return Markup(re.sub("`([^`]+)`", r"<code>\1</code>", str(escape(text))))


def slug(text: str) -> str:
    """Letters, digits and - only, for identifiers."""
    return re.sub(r"[^a-z0-9]+", "-", text.lower()).strip("-")


def _first_run(results: Results) -> str:
    """The run whose pictures come first: the first that is held against another and has registers."""
    study = results.study
    held = (run for run, entry in study.runs.items() if run in study.references and entry["registers"] != "none")
    return next(held, next(iter(study.runs), ""))


def _search_blocks(results: Results) -> Iterator[Block]:
    """What the search saw in each backbone, where outliers sit, and what kind of sink they are in each run."""
    study = results.study
    if len(study.backbones) > 1:
        every = plot_distributions({backbone: study.search(backbone, "histogram") for backbone in study.backbones})
        yield Block(
            "All backbones",
            plots=[Plot(every, "Norms of the patches, heights logarithmic: outliers are a second hump to the right.")],
        )
    for backbone in study.backbones:
        scores, norms = study.search(backbone, "scores"), plot_norms(study.search(backbone, "norms"))
        if scores.empty:
            plots = [Plot(norms, "Norms of the patches by block: no outliers, so no neurons to show.")]
        else:
            histogram = plot_histogram(study.search(backbone, "histogram"), results.searched(backbone, "threshold"))
            plots = [
                Plot(norms, "Norms of the patches by block."),
                Plot(histogram, "With and without a test-time register."),
                Plot(plot_scores(scores), "Share of the outliers' excess that each neuron writes, best first."),
            ]
        for dataset in study.measured["tokens"]:
            if (share := _places(results, backbone, dataset)) is not None:
                plots.append(Plot(plot_places(share), f"Where the outliers of {dataset} sit in the image."))
        yield Block(f"Backbone {backbone}", plots=plots)
    if sinks := sinks_table(study, study.runs):
        yield Block(sinks.title, table=sinks)


def _places(results: Results, backbone: str, dataset: str) -> pd.Series | None:
    """Share of the images with an outlier, by place: the same for all runs of a backbone."""
    for run, entry in results.study.runs.items():
        table = results.study.table(run, "tokens", dataset, "positions")
        if entry["backbone"] == backbone and not table.empty and table["share"].any():
            return table["share"]
    return None


def _stage_blocks(results: Results, stage: str) -> Iterator[Block]:
    """Table, plots and pictures of a measurement, for each of its sets."""
    study = results.study
    for dataset in study.measured[stage]:
        table = measurement_table(results, stage, dataset)
        if not table:
            continue
        yield Block(
            table.title, table=table, plots=[*_curves(results, stage, dataset), *_points(results, stage, dataset)]
        )
        if registers := register_table(results, dataset) if stage == "attention" else None:
            yield Block(registers.title, table=registers)
        for i, (file, heading, text) in enumerate(DRAWN.get(stage, ())):
            shown = list(_pictures(results, (stage, dataset, file), heading))
            if shown:
                names = [each.run for each in shown]
                first = _first_run(results)
                chosen = names.index(first) if first in names else 0
                key = f"{stage}-{slug(dataset)}" + (f"-{Path(file).stem}" if i else "")
                yield Block(f"{heading}, {dataset}", text, pictures=shown, key=key, chosen=chosen)


def _curves(results: Results, stage: str, dataset: str) -> Iterator[Plot]:
    """Figures by block, all runs together."""
    for (of, name), columns in CURVES.items():
        tables = {run: results.study.table(run, stage, dataset, name) for run in results.study.runs if of == stage}
        for column, label, caption in columns:
            if any(column in table and table[column].fillna(0).any() for table in tables.values()):
                yield Plot(plot_layers(tables, column, label, log=name == "norms"), caption)


def _points(results: Results, stage: str, dataset: str) -> Iterator[Plot]:
    """Dots with intervals, a row a figure; figures that no run has are left out."""
    for pattern, label, caption in POINTS.get(stage, ()):
        places = [place for place in results.places(stage, dataset) if re.match(pattern, place.metric)]
        if places:
            metrics = [METRICS[stage][place.metric] for place in places]
            series = {run: [results.value(run, place) for place in places] for run in results.study.runs}
            yield Plot(plot_points([each.label for each in metrics], series, label, metrics[0].scale), caption)


def _pictures(results: Results, of: tuple[str, str, str], heading: str) -> Iterator[Shown]:
    """A picture (of a stage, data set and file) of the runs that it was left for."""
    study = results.study
    paths = {run: study.path(run, *of) for run in study.runs}
    paths = {run: path for run, path in paths.items() if path.is_file()}
    count = sum(len(study.measured[stage]) * len(files) for stage, files in DRAWN.items()) * len(study.runs)
    limit = min(LARGEST_PICTURE, ALL_PICTURES // max(1, count))
    drawn = {run: picture(path, f"{heading} of {of[1]} in run {run}", limit) for run, path in paths.items()}
    for run, each in drawn.items():
        under = study.references.get(run)
        alike = under in drawn and (drawn[under].width, drawn[under].height) == (each.width, each.height)
        yield Shown(run, each, under if alike else None)


def _classification(results: Results, tables: Sequence[Table]) -> Iterator[Block]:
    """The comparison tables, and accuracies of the CLS readout."""
    study = results.study
    sets = [study.in_distribution, *study.sets("ood")]
    series = {run: [results.value(run, results.top1("cls", name)) for name in sets] for run in study.runs}
    plots = []
    if any(value for values in series.values() for value in values):
        plots.append(Plot(plot_points(sets, series, "top-1, %", 100), "Linear probe on CLS."))
    for i, table in enumerate(tables):
        yield Block(table.title, table=table, plots=plots if i == 0 else ())
