"""report: tables, self-checks, plots and pictures of all runs in one page; metrics/report.html and summary.json."""

import json
from pathlib import Path

from regvit.files import write_json, write_text
from regvit.pipeline.command import command
from regvit.pipeline.compare_runs import compare, read_runs
from regvit.pipeline.params import load_params
from regvit.pipeline.read_tables import read_columns, read_measurements
from regvit.report.measurements import TITLE
from regvit.report.sections import Material, Search, report
from regvit.report.summary import summary
from regvit.report.sweeps import read_kept


def main() -> None:
    params = load_params()
    tables, checks = compare(params)
    runs = read_measurements(params, read_runs(params))
    material = Material(
        runs,
        params["backbones"],
        params["datasets"],
        params["scenes"],
        params["in_distribution"],
        params["seed"],
        [table for table in tables if table.title != TITLE],  # the page begins with that one
        checks,
        {name: read_search(name) for name in params["backbones"]},
        sweeps=[read_kept(path) for path in sorted(Path("metrics/sweeps").glob("*.csv"))],
    )
    write_text("metrics/report.html", report(material))
    ood = [name for name, entry in params["datasets"].items() if entry["role"] == "ood"]
    figures = summary(runs, ood, params["evaluate"]["detectors"][0])
    write_json("metrics/summary.json", figures)


def read_search(backbone: str) -> Search:
    """What the search saw in a backbone."""
    folder = Path("metrics/identify") / backbone
    threshold = json.loads(folder.with_suffix(".json").read_text())["threshold"]
    return Search(threshold, *(read_numbers(folder / f"{name}.csv") for name in ("norms", "histogram", "scores")))


def read_numbers(path: Path) -> dict[str, list[float]]:
    """A CSV file of numbers by column."""
    return {name: [float(cell) for cell in cells] for name, cells in read_columns(path).items()}


if __name__ == "__main__":
    command(main, interrupted="metrics/report.html is not finished")
