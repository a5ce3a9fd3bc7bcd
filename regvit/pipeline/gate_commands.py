"""Compares metrics and parameters with another commit, as Markdown; exit code 1 if a guarded metric fell (guard.yaml).

    python -m regvit.pipeline.gate_commands [--against main] [--out comment.md]

The metrics in git are compared, so neither cache nor remote is needed.
"""

import argparse
import json
import subprocess
import sys
from pathlib import Path

from ruamel.yaml import YAML

from regvit.pipeline.gate import Rule, changes, flatten, judge, markdown

SUMMARY = Path("metrics/summary.json")  # repeats figures of the other files, without their intervals
COMMENT = 65_536  # characters that GitHub takes in a comment


def main(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--against", default="main", help="commit, branch or tag to compare with (default: main)")
    parser.add_argument("--out", type=Path, help="write the Markdown there as well, cut to fit a comment")
    options = parser.parse_args(arguments)
    table = changes(metrics_at(options.against), metrics_here())
    rules = read_rules(Path("guard.yaml"))
    failures = judge(table, rules)
    params = changed_params(options.against)
    if options.out:  # written as it comes, since it may be /dev/stderr
        options.out.write_text(markdown(table, failures, params, rules, COMMENT))
    print(markdown(table, failures, params, rules))
    return int(bool(failures))


def read_rules(path: Path) -> list[Rule]:
    """The rules of guard.yaml."""
    if not path.is_file():
        sys.exit(f"gate: there is no {path}; it lists the guarded metrics")
    entries = YAML(typ="safe", pure=True).load(path)
    if not isinstance(entries, list) or not entries:
        sys.exit(f"gate: {path} holds {entries!r}; expected a list of {{metric, better, tolerance}}")
    try:
        return [Rule(**entry) for entry in entries]
    except (TypeError, ValueError) as error:
        sys.exit(f"gate: {path}: {error}; an entry has the keys metric, better and tolerance, and may have without")


def metrics_here() -> dict[str, float]:
    """All metric files of the working tree."""
    paths = [path for path in sorted(Path("metrics").rglob("*.json")) if path != SUMMARY]
    return flatten({path.as_posix(): json.loads(path.read_text()) for path in paths})


def metrics_at(revision: str) -> dict[str, float]:
    """All metric files of a commit."""
    listed = git("ls-tree", "-r", "-z", "--name-only", revision, "metrics").split("\0")
    names = [name for name in listed if name.endswith(".json") and name != SUMMARY.as_posix()]
    if not names:
        sys.exit(f"gate: {revision} has no metrics/*.json to compare with")
    return flatten({name: json.loads(git("show", f"{revision}:{name}")) for name in names})


def changed_params(revision: str) -> list[tuple[str, str, str]]:
    """(name, value at the revision, value here) of each parameter that differs."""
    ran = subprocess.run(["dvc", "params", "diff", "--json", revision], capture_output=True, text=True)
    if ran.returncode:
        sys.exit(f"gate: dvc params diff {revision} failed: {ran.stderr.strip()}")
    found = json.loads(ran.stdout or "{}").get("params.yaml", {})
    return [(name, str(v.get("old", "–")), str(v.get("new", "–"))) for name, v in sorted(found.items())]


def git(*arguments: str) -> str:
    ran = subprocess.run(["git", *arguments], capture_output=True, text=True)
    if ran.returncode:
        sys.exit(f"gate: git {' '.join(arguments)} failed: {ran.stderr.strip()}")
    return ran.stdout


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
