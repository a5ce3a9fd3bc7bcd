"""tokens@<run>-<dataset>: where outliers sit and what single tokens know; metrics/runs/<run>/tokens/<dataset>/."""

from pathlib import Path

from regvit.features.dense_set import DenseSet
from regvit.measures import anatomy
from regvit.measures.anatomy import Anatomy, draw_anatomy, norm_table, position_table
from regvit.measures.tables import mean_figures, write_images, write_table
from regvit.measures.token_probes import (
    by_kind,
    chance,
    class_from_token,
    fit_patch_probes,
    kinds_of_tokens,
    read_patches,
    tokens_and_pixels,
)
from regvit.pipeline.command import command
from regvit.pipeline.params import load_params
from regvit.pipeline.runtime import Runtime
from regvit.stats.figures import Figure, figures_table, write_figures


def main(run: str, name: str) -> None:
    params, device = load_params(), Runtime.load().device
    seed, out = params.seed, Path("metrics/runs") / run / "tokens" / name
    dense, labelled = (
        DenseSet.open(Path("data") / each, Path("features/dense") / run / f"{each}.zarr", device)
        for each in (name, params.in_distribution)
    )
    train, test = dense.rows("train"), dense.rows("test")
    seen = Anatomy.of(dense, test)
    norms = norm_table(seen)
    probes = fit_patch_probes(tokens_and_pixels(dense, train))
    columns = by_kind(read_patches(probes, tokens_and_pixels(dense, test)), seen.outliers)
    figures = anatomy.figures(seen, norms, seed) + mean_figures(columns, seed)
    figures += [Figure(metric, value) for metric, value in chance(seen.outliers.shape[1]).items()]

    # scenes have no class: it is read from the tokens of the ID set
    learned, tested = labelled.rows("train", having="label"), labelled.rows("test", having="label")
    labels = labelled.dataset.labels()
    classes = class_from_token(
        kinds_of_tokens(labelled, learned), labels[learned], kinds_of_tokens(labelled, tested), labels[tested], seed
    )
    of_classes = mean_figures(classes, seed)
    tables = figures_table(figures, run, name), figures_table(of_classes, run, params.in_distribution)
    write_figures(out / "figures.csv", *tables)
    write_images(out / "images.csv", dense.image_ids(test), anatomy.image_columns(seen) | columns)
    write_table(out / "norms.csv", norms)
    write_table(out / "positions.csv", position_table(seen))
    draw_anatomy(out / "anatomy.png", seen, f"{run}: {name}")
    shown = ("outlier_fraction", "position_top1", "pixels_l2", "class_top1")
    print(
        f"{run}/{name}: "
        + ", ".join(f"{f.metric} {f.value}" for f in figures + of_classes if f.metric.startswith(shown))
    )


if __name__ == "__main__":
    command(main, "run", "dataset", interrupted="metrics/runs/{0}/tokens/{1} is not finished")
