"""differences: each run against its reference, image by image; metrics/differences.json and .csv."""

import json
from pathlib import Path

from evaluate import plan_of, sha256
from regvit.files import write_json, write_table
from regvit.measures.evaluation import COMPARED, Drawn, Plan, difference_rows, differences_between, draw, rounded
from regvit.pipeline.command import command
from regvit.pipeline.params import load_params
from regvit.probing.predictions import load_predictions
from regvit.probing.probes import InvalidProbes
from regvit.report.references import references

HEADER = (
    "run", "reference", "readout", "reference_readout", "metric", "dataset", "detector", "difference", "lo", "hi", "p", "n",
)  # fmt: skip


def main() -> None:
    params = load_params()
    plan = plan_of(params)
    pairs = references(params["runs"], params["backbones"], params["compare"]["references"])
    drawn = {run: open_drawn(run, plan) for run in dict.fromkeys([*pairs, *pairs.values()])}
    table = {f"{run}-{other}": differences_between(drawn[run], drawn[other], plan) for run, other in pairs.items()}
    table = rounded(table)
    write_json("metrics/differences.json", table)
    rows = [
        (*pair.split("-"), *both.split("-"), *row)
        for pair, readouts in table.items()
        for both, values in readouts.items()
        for row in difference_rows(values, plan)
    ]
    write_table("metrics/differences.csv", HEADER, rows)
    for run, other in pairs.items():
        print(f"{run} against {other}: {', '.join(table[f'{run}-{other}'])}")


def open_drawn(run: str, plan: Plan) -> Drawn:
    """A run's predictions, which must be those that its metrics were made from, resampled."""
    path, record = Path(f"features/{run}/predictions.safetensors"), Path(f"metrics/evaluate/{run}/differences.json")
    for file in (path, record):
        if not file.is_file():
            raise FileNotFoundError(f"there is no {file}: run `dvc repro evaluate@{run}`, or `dvc pull` what it made")
    expected, found = (
        json.loads(record.read_text())["predictions_sha256"],
        sha256(path),
    )
    if found != expected:
        raise InvalidProbes(
            f"{path} has SHA-256 {found[:12]}…, and {record} was made from {expected[:12]}…; run `dvc checkout` or"
            f" `dvc repro evaluate@{run}`"
        )
    return draw(load_predictions(path), plan, COMPARED)


if __name__ == "__main__":
    command(main, interrupted="metrics/differences.json is not finished")
