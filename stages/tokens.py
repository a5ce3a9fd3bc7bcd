"""tokens@<run>-<dataset>: where outliers sit, and what single patches know of their place and pixels; metrics/runs/<run>/tokens/<dataset>/."""

from pathlib import Path

from regvit.features.dense_set import DenseSet
from regvit.measures import anatomy, token_probes
from regvit.measures.anatomy import Anatomy, draw_anatomy, norm_table, position_table
from regvit.measures.tables import mean_figures, write_images
from regvit.pipeline.command import command
from regvit.pipeline.params import load_params
from regvit.pipeline.runtime import Runtime
from regvit.stats.figures import Figure, figures_table, write_csv, write_figures


def main(run: str, name: str) -> None:
    seed, device = load_params().seed, Runtime.load().device
    out = Path("metrics/runs") / run / "tokens" / name
    dense = DenseSet.open(Path("data") / name, Path("features/dense") / run / f"{name}.zarr", device)
    train, test = dense.rows("train"), dense.rows("test")
    seen = Anatomy.of(dense, test)
    norms = norm_table(seen)
    probes = token_probes.fit_patch_probes(token_probes.tokens_and_pixels(dense, train))
    columns = token_probes.by_kind(
        token_probes.read_patches(probes, token_probes.tokens_and_pixels(dense, test)), seen.outliers
    )
    figures = anatomy.figures(seen, norms, seed) + mean_figures(columns, seed)
    figures += [Figure(metric, value) for metric, value in token_probes.chance(seen.outliers.shape[1]).items()]
    write_figures(out / "figures.csv", figures_table(figures, run, name))
    write_images(out / "images.csv", dense.image_ids(test), anatomy.image_columns(seen) | columns)
    write_csv(out / "norms.csv", norms)
    write_csv(out / "positions.csv", position_table(seen))
    draw_anatomy(out / "anatomy.png", seen, f"{run}: {name}")
    shown = ("outlier_fraction", "position_top1", "pixels_l2")
    print(f"{run}/{name}: " + ", ".join(f"{f.metric} {f.value}" for f in figures if f.metric.startswith(shown)))


if __name__ == "__main__":
    command(main, "run", "dataset", interrupted="metrics/runs/{0}/tokens/{1} is not finished")
