"""The made-up study, written and compared once."""

import pytest
from report_example import write_study

from regvit.report.differences import difference_rows
from regvit.report.page import report
from regvit.report.results import Results
from regvit.report.study import all_figures


@pytest.fixture(scope="session")
def results(tmp_path_factory) -> Results:
    study = write_study(tmp_path_factory.mktemp("metrics"))
    return Results.of(study, all_figures(study), difference_rows(study))


@pytest.fixture(scope="session")
def page(results) -> str:
    return report(results)
