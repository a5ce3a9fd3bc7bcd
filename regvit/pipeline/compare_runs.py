"""Prints the comparison table and the self-checks from metrics/; fails if a check does.

`--readme` puts the three tables that say most into README.md instead, between its markers.
"""

import json
import signal
import sys
from pathlib import Path

from regvit.files import write_text
from regvit.pipeline.params import load_params
from regvit.pipeline.read_tables import read_measurements
from regvit.report.compare import (
    Check,
    Measured,
    Table,
    accuracy_table,
    anomaly_table,
    classifier_table,
    control_table,
    detector_table,
    difference_table,
    outlier_table,
    self_checks,
)
from regvit.report.measurements import measurement_table
from regvit.report.references import references

IN_README = ("What registers change", "Accuracy", "Outlier patches left")
BEGIN, END = "<!-- results: python -m regvit.pipeline.compare_runs --readme -->", "<!-- end of results -->"


def main(*arguments: str) -> int:
    tables, checks = compare(load_params())
    if arguments == ("--readme",):
        write_readme(Path("README.md"), [table for table in tables if table.title.startswith(IN_README)])
    elif arguments:
        sys.exit("usage: python -m regvit.pipeline.compare_runs [--readme]")
    else:
        print("\n\n".join(table.text() for table in tables))
        print("\nSelf-checks" + "".join(f"\n{check.text()}" for check in checks))
        failed = sum(not check.passed for check in checks)
        none = "there are none: no run is on a planted backbone"
        print(f"{failed} of {len(checks)} checks failed" if failed else f"all {len(checks)} hold" if checks else none)
    return int(not all(check.passed for check in checks))


def write_readme(path: Path, tables: list[Table]) -> None:
    """Replaces what stands between the README's markers by the tables."""
    text = path.read_text()
    if text.count(BEGIN) != 1 or text.count(END) != 1:
        sys.exit(f"{path} must hold the lines {BEGIN!r} and {END!r} once each: the tables go between them")
    head, tail = text[: text.index(BEGIN) + len(BEGIN)], text[text.index(END) :]
    blocks = (f"{table.title}:\n\n{table.markdown()}\n" for table in tables)
    write_text(path, head + "\n\n" + "\n".join(blocks) + "\n" + tail)


def compare(params: dict) -> tuple[list[Table], list[Check]]:
    """Tables and checks over the runs of params.yaml, in its order; what lies in metrics/ besides is not looked at."""
    runs, home, detectors = read_runs(params), params["in_distribution"], params["evaluate"]["detectors"]
    ood, anomaly = ([n for n, d in params["datasets"].items() if d["role"] == role] for role in ("ood", "anomaly"))
    changed = measurement_table(read_measurements(params, runs), home, params["seed"])
    tables = [changed, accuracy_table(runs, home, ood), classifier_table(runs, home, ood)]
    if anomaly:
        tables += [anomaly_table(runs, anomaly, detectors[0]), detector_table(runs, detectors)]
    searched = {name: read(f"metrics/identify/{name}.json") for name in params["backbones"]}
    tables += [difference_table(runs, home, detectors[0]), outlier_table(runs), control_table(searched)]
    return [table for table in tables if table.rows], list(self_checks(runs))


def read_runs(params: dict) -> list[Measured]:
    """The metrics of every run."""
    held = references(params["runs"], params["backbones"], params["compare"]["references"])
    differences = read("metrics/differences.json")
    return [
        Measured(
            name,
            run["registers"],
            run["num_registers"],
            read(f"metrics/evaluate/{name}.json"),
            read(f"metrics/identify/{run['backbone']}.json"),
            read(f"metrics/verify/{name}.json"),
            run.get("neurons", "selected"),
            read(f"metrics/evaluate/{name}/differences.json")["differences"],
            held.get(name),
            differences.get(f"{name}-{held.get(name)}", {}),
        )
        for name, run in params["runs"].items()
    ]


def read(path: str) -> dict:
    if not Path(path).is_file():
        sys.exit(f"there is no {path}: run `dvc repro` first")
    return json.loads(Path(path).read_text())


if __name__ == "__main__":
    signal.signal(signal.SIGPIPE, signal.SIG_DFL)  # `| head` ends it in silence, as it ends `cat`
    sys.exit(main(*sys.argv[1:]))
