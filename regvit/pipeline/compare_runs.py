"""Prints the comparison of the runs and the self-checks; exit code 1 if a check fails (`make compare`).

`--readme` puts the table that says most into README.md instead, between its markers; names of experiments are compared in
their stead (`compare_experiments`).
"""

import re
import signal
import sys
from pathlib import Path

from regvit.files import write_text
from regvit.pipeline.command import show_anything
from regvit.pipeline.params import load_params
from regvit.pipeline.studies import study_of
from regvit.report.checks import findings, self_checks, summary_line
from regvit.report.comparison import comparison, readme_table
from regvit.report.results import Results

BEGIN, END = "<!-- results: python -m regvit.pipeline.compare_runs --readme -->", "<!-- end of results -->"


def main(*arguments: str) -> int:
    if arguments and arguments != ("--readme",):
        from regvit.pipeline import compare_experiments  # DVC takes half a second to import

        return compare_experiments.main(*arguments)
    try:
        results = Results.read(study_of(load_params()))
    except FileNotFoundError as error:
        sys.exit(str(error))
    checks = self_checks(results)
    if arguments:
        write_readme(Path("README.md"), results)
    else:
        print("\n\n".join(table.text() for table in comparison(results)))
        print("\nOutliers", *findings(results), sep="\n")
        print("\nSelf-checks", *(check.text() for check in checks), summary_line(checks), sep="\n")
    return int(not all(check.passed for check in checks))


def write_readme(path: Path, results: Results) -> None:
    """Replaces what stands between the README's markers by the table."""
    text = path.read_text()
    if text.count(BEGIN) != 1 or text.count(END) != 1:
        sys.exit(f"{path} must hold the lines {BEGIN!r} and {END!r} once each: the table goes between them")
    head, tail = text[: text.index(BEGIN) + len(BEGIN)], text[text.index(END) :]
    table = re.sub(r" {2,}", " ", readme_table(results).markdown())  # lined-up columns take a third more bytes
    table = re.sub(r"-{3,}", "---", table)
    write_text(path, f"{head}\n\n{table}\n\n{tail}")


if __name__ == "__main__":
    show_anything()
    signal.signal(signal.SIGPIPE, signal.SIG_DFL)  # `| head` ends it in silence, as it ends `cat`
    sys.exit(main(*sys.argv[1:]))
