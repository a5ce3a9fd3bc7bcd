"""The charts of DVC's plots: every table is drawn, for one revision and for two, with no network."""

import shutil
import sys
from pathlib import Path

import pandas as pd
import pytest
from browser import Browser, find_chromium
from git_repository import DVC, begin, commit, run
from ruamel.yaml import YAML

from regvit.pipeline.plots_template import charts
from regvit.report.plot_tables import COLUMNS

ROOT = Path(__file__).parents[2]
CHROMIUM = find_chromium()
in_a_browser = pytest.mark.skipif(
    CHROMIUM is None, reason="no Chromium: install one (apt-get install chromium), or name it in CHROMIUM"
)
DRAWN = """[...document.querySelectorAll('body > div')].map((chart) => [
  chart.id,
  [...chart.querySelectorAll('.role-mark path, .role-mark text')].filter((mark) => mark.getBBox().width > 0
    || mark.getBBox().height > 0).length,
  chart.textContent,
])"""


def declared() -> dict[str, dict]:
    """Properties of each table that the stage `report` lists as a plot, by its path."""
    stages = YAML(typ="safe", pure=True).load(ROOT / "dvc.yaml")["stages"]
    return {path: properties for plot in stages["report"]["plots"] for path, properties in plot.items()}


def write_tables(folder: Path, shift: float) -> None:
    """Three runs in two panels for every table but the last one, which has no rows; some values have no interval."""
    rows = [(run, panel, x, x + shift, x - 1 if run == "b" else None, x + 1 if run == "b" else None)
            for run in "abc" for panel in "pq" for x in range(4)]  # fmt: skip
    (folder / "metrics/plots").mkdir(parents=True, exist_ok=True)
    *drawn, empty = declared()
    for path in drawn:
        pd.DataFrame(rows, columns=COLUMNS).to_csv(folder / path, index=False)
    pd.DataFrame(columns=COLUMNS).to_csv(folder / empty, index=False)


@pytest.fixture(scope="module")
def repository(tmp_path_factory) -> Path:
    """A repository with DVC, this project's page and templates, and tables, committed and changed."""
    folder = tmp_path_factory.mktemp("repository")
    (folder / "regvit/pipeline").mkdir(parents=True)
    shutil.copy(ROOT / "regvit/pipeline/plots_template.py", folder / "regvit/pipeline")
    begin(folder)
    run(folder, sys.executable, "regvit/pipeline/plots_template.py")
    write_tables(folder, 0.0)
    YAML(typ="safe", pure=True).dump({"plots": [{path: of} for path, of in declared().items()]}, folder / "dvc.yaml")
    commit(folder, "base")
    write_tables(folder, 0.5)
    return folder


def opened(page: Path) -> dict[str, tuple[int, str]]:
    """(marks, text) of each chart, by its identifier, of a page that told the console nothing and asked the network nothing."""
    with Browser(CHROMIUM) as browser:
        browser.open(page, 1440, False)
        waiting = "[...document.querySelectorAll('div script')].length"  # Vega puts a drawing in the script's place
        browser.evaluate(
            f"new Promise((done) => {{const wait = () => {waiting} ? setTimeout(wait, 100) : setTimeout(done, 300); wait()}})"
        )
        assert browser.errors() == []
        assert [url for url in browser.requested() if not url.startswith("file:")] == []
        return {name: (marks, text) for name, marks, text in browser.evaluate(DRAWN)}


def test_every_table_has_a_template_a_title_and_the_columns_that_the_report_writes():
    for path, properties in declared().items():
        assert properties["template"] in charts(), path
        assert properties["title"] and {properties["x"], properties["y"]} <= set(COLUMNS)


def test_templates_hold_no_address_and_every_anchor_that_dvc_fills():
    for name, template in charts().items():
        assert "http" not in str(template)
        for anchor in ("TITLE", "DATA", "Y_LABEL"):
            assert f"<DVC_METRIC_{anchor}>" in str(template), (name, anchor)


@in_a_browser
@pytest.mark.parametrize("revisions", [(), ("HEAD", "workspace")])
def test_each_is_drawn_and_one_without_rows_is_named(repository, revisions):
    command = ("diff", *revisions) if revisions else ("show",)
    run(repository, *DVC, "plots", *command, "--out", "page")
    shown = opened(repository / "page/index.html")
    *drawn, empty = [path.replace("/", "_").replace(".", "_") for path in declared()]
    for name in drawn:
        marks, text = shown[name]
        assert marks > 0, f"{name} is an empty frame"
        assert all(revision in text for revision in revisions)
    assert empty not in shown or "no rows" in shown[empty][1]
