"""What the measurement stages left in metrics/, by run; read by the report and by the comparisons."""

import csv
import sys
from collections.abc import Sequence
from json import loads
from pathlib import Path

from regvit.report.compare import Measured
from regvit.report.comparisons import Measurements

TABLES = {  # files beside the metrics that are read, by stage
    "tokens": ("norms", "positions", "images"),
    "attention": ("layers", "images"),
    "discover": ("images",),
    "segment": ("images", "pixels"),
    "depth": ("images",),
    "zeroshot": (),
}


def read_measurements(params: dict, runs: Sequence[Measured]) -> list[Measurements]:
    """Of every run, what params.yaml asks for; what lies in metrics/ besides is not looked at."""
    asked = {
        "tokens": params["tokens"]["datasets"],
        "attention": params["attention"]["datasets"],
        "discover": params["discover"]["datasets"],
        "segment": params["segment"]["datasets"],
        "depth": params["depth"]["datasets"],
    }
    measured = []
    for run in runs:
        own = asked | ({"zeroshot": params["zeroshot"]["datasets"]} if run.name in params["zeroshot"]["runs"] else {})
        found = {stage: {name: _metrics(stage, run.name, name) for name in names} for stage, names in own.items()}
        tables = {
            (stage, name, table): read_columns(Path("metrics") / stage / run.name / name / f"{table}.csv")
            for stage, names in own.items()
            for name in names
            for table in TABLES[stage]
        }
        verified = Path("metrics/verify") / run.name / "images.csv"
        tables[("verify", params["in_distribution"], "images")] = read_columns(verified)
        measured.append(Measurements(run, params["runs"][run.name]["backbone"], found, tables))
    return measured


def read_columns(path: Path) -> dict[str, list[str]]:
    """A CSV file by column, cells as text."""
    with open(_there(path), newline="") as file:
        reader = csv.DictReader(file)
        rows = list(reader)
    return {name: [row[name] for row in rows] for name in reader.fieldnames or ()}


def _metrics(stage: str, run: str, dataset: str) -> dict:
    return loads(_there(Path("metrics") / stage / run / f"{dataset}.json").read_text())


def _there(path: Path) -> Path:
    if not path.is_file():
        sys.exit(f"there is no {path}: run `dvc repro` first")
    return path
