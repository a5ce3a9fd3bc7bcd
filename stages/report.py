"""report: tables, self-checks, plots and pictures of all runs in one page, and the tables of `dvc plots`; metrics/report.html
and metrics/plots/."""

from regvit.files import write_text
from regvit.pipeline.command import command
from regvit.pipeline.params import load_params
from regvit.pipeline.studies import study_of
from regvit.report.page import report
from regvit.report.plot_tables import write_plots
from regvit.report.results import Results


def main() -> None:
    results = Results.read(study_of(load_params()))
    write_plots(results)
    write_text("metrics/report.html", report(results))


if __name__ == "__main__":
    command(main, interrupted="metrics/report.html is not finished")
