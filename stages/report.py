"""report: tables, self-checks, plots and pictures of all runs in one page, and the tables of `dvc plots`; metrics/report.html
and metrics/plots/."""

from regvit.files import write_text
from regvit.pipeline.command import command
from regvit.pipeline.params import load_params
from regvit.report.page import report
from regvit.report.plot_tables import write_plots
from regvit.report.results import Results
from regvit.report.study import Study


def main() -> None:
    params = load_params()
    results = Results.read(Study.of(params.model_dump()))
    write_plots(results)
    write_text("metrics/report.html", report(results))


if __name__ == "__main__":
    command(main, interrupted="metrics/report.html is not finished")
