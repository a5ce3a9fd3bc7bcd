"""compare: every figure of every run in one table, and the paired differences between runs and between readouts of a run;
metrics/compare/figures.csv and differences.csv."""

from pathlib import Path

import pandas as pd

from regvit.measures.evaluation import paired_differences, readout_pairs
from regvit.pipeline.command import command
from regvit.pipeline.params import load_params
from regvit.pipeline.studies import study_of
from regvit.probing.predictions import open_predictions
from regvit.report.differences import difference_rows, write_compared
from regvit.report.study import all_figures


def main() -> None:
    params = load_params()
    study = study_of(params)
    write_compared("metrics/compare/figures.csv", all_figures(study))
    opened = {run: open_predictions(Path(f"features/predictions/{run}.zarr")) for run in study.runs}
    drawn = {"resamples": params.evaluate.bootstrap, "seed": study.seed}
    tables = [difference_rows(study)]
    for run, reference in [*study.held(), *((run, run) for run in study.runs)]:
        pairs = readout_pairs(opened[run], opened[reference], study.bases)
        tables += [paired_differences(opened[run], a, opened[reference], b, **drawn) for a, b in pairs]
    write_compared("metrics/compare/differences.csv", pd.concat(tables))
    for run, reference in study.held():
        print(f"{run} against {reference}")


if __name__ == "__main__":
    command(main, interrupted="metrics/compare is not finished")
