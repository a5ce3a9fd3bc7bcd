"""All benchmarks of a ratio in one table: `python -m benchmarks [--quick] [--only NAME]`.

Each compares two ways of doing the same work, in turn in one process, so that the ratio means something on a loaded
machine. Absolute times are given for GPUs only. Writes benchmarks/results/<kind of machine>.json.

Others have a command of their own, as they are no ratio or take long: `python -m benchmarks.memory` (memory at 1, 4 and
16 times the images), `python -m benchmarks.stores` (files, bytes, hashing), `python -m benchmarks.pipeline` (no-op
`dvc repro` of 200 runs × data sets).
"""

import argparse
import importlib
import json
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

from benchmarks.machine import describe, in_words

MODULES = ("extraction", "identification", "probes", "detectors", "stores")  # in the order of the table
RESULTS = Path(__file__).parent / "results"
COLUMNS = ("name", "ratio", "ratio_lo", "ratio_hi", "rounds", "wanted", "detail")


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__.split("\n\n")[0])
    parser.add_argument("--quick", action="store_true", help="tiny sizes: does everything run? the ratios say little")
    parser.add_argument("--only", nargs="+", choices=MODULES, default=MODULES, help="some of them")
    parser.add_argument(
        "--out", type=Path, help="JSON; default: benchmarks/results/<kind of machine>.json, with --quick none"
    )
    given = parser.parse_args(arguments)
    machine = describe()
    print(f"{machine['processor']}, {machine['cores']} cores, {machine['gpu'] or 'no GPU'}; torch "
          f"{machine['versions']['torch']}, Python {machine['versions']['python']}\n")  # fmt: skip
    rows = run({name: importlib.import_module(f"benchmarks.{name}").measure for name in given.only}, given.quick)
    print("\n" + table(rows))
    out = given.out or (None if given.quick else RESULTS / f"{machine['kind']}.json")
    if out is not None:
        out.parent.mkdir(parents=True, exist_ok=True)
        out.write_text(json.dumps({"machine": machine, "quick": given.quick, "rows": rows}, indent=1) + "\n")
        print(f"\n{out}")
    return int(any(is_below(row) for row in rows) and not given.quick)


def run(measures: dict[str, Callable[[bool], list[dict]]], quick: bool) -> list[dict]:
    """The rows of all benchmarks, each of them checked.

    Raises:
        ValueError: a benchmark gave a row with other keys.
    """
    rows = []
    for module, measure in measures.items():
        print(f"{module} …", flush=True)
        for row in measure(quick):
            if set(row) != set(COLUMNS):
                raise ValueError(f"benchmarks.{module} gave a row with {sorted(row)}; expected {', '.join(COLUMNS)}")
            rows.append({column: row[column] for column in COLUMNS})
    return rows


def table(rows: Sequence[dict]) -> str:
    """Rows as a Markdown table; a median ratio below what is wanted is marked."""
    lines = ["| what | times as fast [95 %] | wanted | detail |", "|---|---:|---:|---|"]
    for row in rows:
        mark, aim = (" **below**" if is_below(row) else ""), "–" if row["wanted"] is None else f"≥ {row['wanted']:g}"
        lines.append(f"| {row['name']} | {in_words(row)}{mark} | {aim} | {row['detail']} |")
    return "\n".join(lines)


def is_below(row: dict) -> bool:
    """Whether a ratio misses its aim; one without an aim cannot."""
    return row["wanted"] is not None and row["ratio"] < row["wanted"]


if __name__ == "__main__":
    sys.exit(main())
