"""The cures of a backbone in one table, after `dvc repro` of a choice that has some: `python -m regvit.pipeline.cure_table`.

Reads what the stages left of every run, pairs each with the untreated run and with the one that has test-time registers, and
measures what a forward costs. Writes metrics/cures/<backbone>.md, .svg, and the differences as CSV.
"""

import argparse
import sys
from collections.abc import Mapping
from pathlib import Path

import torch

from regvit.data.manifest import read_dataset
from regvit.files import write_text
from regvit.measures.forward_cost import Cost, relative_cost
from regvit.pipeline.command import show_anything
from regvit.pipeline.params import load_params
from regvit.pipeline.runtime import Runtime
from regvit.pipeline.studies import study_of
from regvit.probing.predictions import open_predictions
from regvit.registers.runs import open_run
from regvit.report.cure_table import Rows, as_markdown, cure_differences, cure_tables, draw_cures, rows_of
from regvit.report.differences import write_compared
from regvit.report.results import Results
from regvit.report.study import all_figures

OUT, IMAGES = Path("metrics/cures"), 8  # images of a forward whose cost is measured


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--pairs", type=int, default=20, help="pairs of forwards of the cost (20); 0 leaves it out")
    given = parser.parse_args()
    params = load_params()
    study = study_of(params)
    if not (every := rows_of(study)):
        sys.exit(
            "no run of params.yaml has a cure beside an untreated run of its backbone; `make choose NAME=cures` has some"
        )
    try:
        figures = all_figures(study)
    except FileNotFoundError as error:
        sys.exit(str(error))
    for rows in every:
        backbone = study.runs[rows.original]["backbone"]
        predictions = {run: open_predictions(Path(f"features/predictions/{run}.zarr")) for run in rows.runs}
        differences = cure_differences(study, rows, predictions, params.evaluate.bootstrap)
        results = Results.of(study, figures, differences)
        costs = measured_costs(rows, study.in_distribution, given.pairs) if given.pairs else {}
        tables = [table for table in cure_tables(results, rows, costs) if table]
        OUT.mkdir(parents=True, exist_ok=True)
        write_compared(OUT / f"{backbone}.csv", differences)
        write_text(OUT / f"{backbone}.md", as_markdown(tables))
        draw_cures(results, rows).savefig(OUT / f"{backbone}.svg")
        print("\n\n".join(table.text() for table in tables), f"\n{OUT / backbone}.md", sep="\n")


def measured_costs(rows: Rows, dataset: str, pairs: int) -> Mapping[str, Cost]:
    """Of every run but the untreated one, beside it, on the first images of a test split."""
    runtime, images = Runtime.load(), read_dataset(Path("data") / dataset).subset("test")

    def opened(run: str) -> torch.nn.Module:
        backbone = open_run(Path(f"features/runs/{run}.json"), Path("data/backbones"))
        return backbone, backbone.model.to(runtime.device)

    backbone, plain = opened(rows.original)
    pixels = torch.stack([backbone.transform.load(images.image_path(i)) for i in range(min(IMAGES, len(images)))])
    x = backbone.transform.normalise(pixels.to(runtime.device))
    return {run: relative_cost(opened(run)[1], plain, x, pairs) for run in rows.runs if run != rows.original}


if __name__ == "__main__":
    show_anything()
    main()
