"""Prints the comparison table and the self-checks from metrics/; fails if a check does. `--markdown`: for the README."""

import json
import sys
from pathlib import Path

from params import load_params
from regvit.compare import Check, Measured, Table, accuracy_table, outlier_table, self_checks


def main(*arguments: str) -> int:
    tables, checks = compare(load_params())
    if arguments == ("--markdown",):
        print("\n\n".join(f"{table.title}\n\n{table.markdown()}" for table in tables))
    elif arguments:
        sys.exit("usage: python stages/compare.py [--markdown]")
    else:
        print("\n\n".join(table.text() for table in tables))
        print("\nSelf-checks" + "".join(f"\n{check.text()}" for check in checks))
        failed = sum(not check.passed for check in checks)
        none = "there are none: no run is on a planted backbone"
        print(f"{failed} of {len(checks)} checks failed" if failed else f"all {len(checks)} hold" if checks else none)
    return int(not all(check.passed for check in checks))


def compare(params: dict) -> tuple[list[Table], list[Check]]:
    """Tables and checks over the runs of params.yaml, in its order; what lies in metrics/ besides is not looked at."""
    runs = read_runs(params)
    names = {role: [n for n, d in params["datasets"].items() if d["role"] == role] for role in ("ood", "anomaly")}
    detector = params["evaluate"]["detectors"][0]
    accuracy = accuracy_table(runs, params["in_distribution"], names["ood"], names["anomaly"], detector)
    return [accuracy, outlier_table(runs)], list(self_checks(runs))


def read_runs(params: dict) -> list[Measured]:
    """The metrics of every run."""
    return [
        Measured(
            name,
            run["registers"],
            run["num_registers"],
            read(f"metrics/evaluate/{name}.json"),
            read(f"metrics/identify/{run['backbone']}.json"),
            read(f"metrics/verify/{name}.json"),
        )
        for name, run in params["runs"].items()
    ]


def read(path: str) -> dict:
    if not Path(path).is_file():
        sys.exit(f"there is no {path}: run `dvc repro` first")
    return json.loads(Path(path).read_text())


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
