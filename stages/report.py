"""report: tables, self-checks and plots of all runs in one page; metrics/report.html."""

import csv
import json
from pathlib import Path

from compare import compare, read_runs
from params import load_params
from regvit.report import (
    check_list,
    figures,
    page,
    picture,
    plot_accuracy,
    plot_histogram,
    plot_norms,
    plot_scores,
    table,
)


def main() -> None:
    params = load_params()
    tables, checks = compare(params)
    sections = [(content.title, table(content)) for content in tables]
    sections.append(("Self-checks", check_list(checks)))
    ood = [name for name, entry in params["datasets"].items() if entry["role"] == "ood"]
    bars = plot_accuracy(read_runs(params), params["in_distribution"], ood)
    sections.append(("Accuracy of the CLS readout", figures([("Whiskers: 95 % interval.", bars)])))
    sections += [(f"Backbone {name}", backbone_figures(name)) for name in params["backbones"]]
    pictures = [(name, Path(f"metrics/verify/{name}.png")) for name in params["runs"]]
    content = [(f"Run {name}", picture(path, f"norms and attention of run {name}")) for name, path in pictures]
    sections.append(("Norms and attention on images", figures(content)))
    Path("metrics/report.html").write_text(page("Register neurons and what they change", sections), encoding="utf-8")


def backbone_figures(name: str) -> str:
    """What the search saw in a backbone; only the norms where it found no outliers."""
    folder = Path("metrics/identify") / name
    threshold = json.loads(folder.with_suffix(".json").read_text())["threshold"]
    norms, histogram, scores = (read_columns(folder / f"{table}.csv") for table in ("norms", "histogram", "scores"))
    content = [("Norm of the patches by block.", plot_norms(norms))]
    if scores["rank"]:
        content += [
            ("With and without a test-time register.", plot_histogram(histogram, threshold)),
            ("Share of the outliers' excess that each neuron writes, best first.", plot_scores(scores)),
        ]
    else:
        content[0] = ("Norm of the patches by block: no outliers, so no neurons to show.", content[0][1])
    return figures(content)


def read_columns(path: Path) -> dict[str, list[float]]:
    """A CSV file of numbers by column."""
    with open(path, newline="") as file:
        reader = csv.DictReader(file)
        rows = list(reader)
    return {name: [float(row[name]) for row in rows] for name in reader.fieldnames}


if __name__ == "__main__":
    main()
