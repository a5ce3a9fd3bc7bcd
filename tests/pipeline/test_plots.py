"""The charts of DVC's plots: columns that exist, a title that names the run, something drawn by every one, no network."""

import csv
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from browser import Browser, find_chromium
from ruamel.yaml import YAML

ROOT = Path(__file__).parent.parent.parent
STAGES = ROOT / "stages"
sys.path.insert(0, str(STAGES))
from regvit.pipeline.plot_charts import charts  # noqa: E402

CHROMIUM = find_chromium()
in_a_browser = pytest.mark.skipif(
    CHROMIUM is None, reason="no Chromium: install one (apt-get install chromium), or name it in CHROMIUM"
)
DRAWN = """[...document.querySelectorAll('.chart')].map((chart) => [
  chart.id,
  chart.parentElement.querySelector('h2').textContent,
  [...chart.querySelectorAll('.role-mark path, .role-mark text')].filter((mark) => mark.getBBox().width > 0
    || mark.getBBox().height > 0).length,
  chart.textContent,
])"""
OWN = ("simple", "scatter")  # templates of DVC that a table of one's own may name
COLUMNS = {  # of a table that every template can draw: values in turn, or a function of the row
    "run": "a", "reference": "b", "metric": ["top1"], "dataset": "st", "detector": "de", "readout": "rs", "query": "qk",
    "kind": "kv", "normalised": "TF", "class": "uvw", "name": "uvw", "learning_rate": "12", "selected": "10",
    "planted": "1100", "layer": "0123", "head": "01", "row": "01", "column": "0123",
    **dict.fromkeys(("before", "after", "min", "median", "max", "x", "y"), lambda i: i + 1),
    **dict.fromkeys(("lo", "x_lo", "y_lo"), lambda i: i), **dict.fromkeys(("hi", "x_hi", "y_hi"), lambda i: i + 3),
    "p99": lambda _: "",
}  # fmt: skip


def declared() -> dict[str, dict]:
    """Properties of each table that dvc.yaml lists as a plot, by its path."""
    stages = YAML(typ="safe", pure=True).load(ROOT / "dvc.yaml")["stages"].values()
    plots = [each for stage in stages for each in stage.get("do", stage).get("plots", [])]
    return {path: properties for plot in plots for path, properties in plot.items() if path.endswith(".csv")}


def run(folder: Path, *command: str) -> str:
    """Output of a command that must end well."""
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
    names = {
        f"GIT_{role}_{what}": "tester@example.org" for role in ("AUTHOR", "COMMITTER") for what in ("NAME", "EMAIL")
    }
    environment = os.environ | names | {"PATH": path, "GIT_CONFIG_GLOBAL": os.devnull}
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    return done.stdout


def repository(folder: Path) -> Path:
    """A repository with DVC, this project's page and templates, and what is in the folder, committed."""
    (folder / "stages").mkdir()
    (folder / ".dvc").mkdir()
    for name in (
        "regvit/pipeline/plots_template.py",
        "regvit/pipeline/plot_charts.py",
        ".dvc/config",
        ".dvc/.gitignore",
    ):
        shutil.copy(ROOT / name, folder / name)
    run(folder, sys.executable, "regvit/pipeline/plots_template.py")
    run(folder, "git", "init", "--quiet")
    run(folder, "git", "add", "--all")
    run(folder, "git", "commit", "--quiet", "--message", "base")
    return folder


def opened(page: Path) -> list[tuple[str, str, int, str]]:
    """(id, heading, marks, text) of each chart of a page that told the console nothing and asked the network nothing."""
    with Browser(CHROMIUM) as browser:
        browser.open(page, 1440, False)
        waiting = "[...document.querySelectorAll('.chart script')].length"  # Vega puts a drawing in the script's place
        browser.evaluate(
            f"new Promise((done) => {{const wait = () => {waiting} ? setTimeout(wait, 100) : setTimeout(done, 300); wait()}})"
        )
        assert browser.errors() == []
        assert [url for url in browser.requested() if not url.startswith("file:")] == []
        return [tuple(each) for each in browser.evaluate(DRAWN)]


def write_table(path: Path, rows: int) -> None:
    cells = [{name: of(i) if callable(of) else of[i % len(of)] for name, of in COLUMNS.items()} for i in range(rows)]
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, list(COLUMNS))
        writer.writeheader()
        writer.writerows(cells)


@pytest.mark.parametrize("path", declared())
def test_a_table_has_a_chart_whose_title_says_of_what(path):
    properties = declared()[path]
    assert properties["template"] in charts()
    for name in set(re.findall(r"\$\{.+?\}", path)):
        assert name in properties["title"].partition(": ")[2], f"{path}: the title does not name {name}"


@pytest.mark.parametrize("path", declared())
def test_the_columns_of_a_chart_are_in_the_tables_that_are_committed(path):
    tables = sorted(ROOT.glob(re.sub(r"\$\{.+?\}", "*", path)))
    for table in tables:
        with table.open(newline="") as file:
            header = next(csv.reader(file))
        assert {declared()[path]["x"], declared()[path]["y"]} <= set(header), table


def test_templates_hold_no_address_and_every_anchor_that_dvc_fills():
    for name, template in charts().items():
        said = str(template)
        assert "http" not in said
        for anchor in ("TITLE", "DATA", "X_LABEL", "Y_LABEL"):
            assert f"<DVC_METRIC_{anchor}>" in said or name == "differences", (name, anchor)


@in_a_browser
def test_every_table_of_the_default_run_with_rows_is_drawn_and_the_others_are_named(tmp_path):
    for name in ("dvc.yaml", "params.yaml"):
        shutil.copy(ROOT / name, tmp_path / name)
    shutil.copytree(ROOT / "metrics", tmp_path / "metrics")
    folder = repository(tmp_path)
    run(folder, "dvc", "plots", "show", "--out", "page")
    rows = {}
    for path in (folder / "metrics").rglob("*.csv"):
        rows[re.sub(r"[^\w]", "_", path.relative_to(folder).as_posix())] = path.read_text().count("\n") - 1
    shown = opened(folder / "page/index.html")
    assert len(shown) > 40
    for name, heading, marks, _ in shown:
        if rows.get(name):
            assert marks > 0, f"{name} is an empty frame"
        else:
            assert heading == "Tables without rows"
    by_heading = {}
    for _, heading, _, text in shown:
        by_heading.setdefault(heading, set()).add(text)
    runs = YAML(typ="safe", pure=True).load(ROOT / "params.yaml")["runs"]
    for name in runs:
        assert any(name in text for text in by_heading["ID against each anomaly set"])


@in_a_browser
def test_two_revisions_are_told_apart_on_every_chart(tmp_path):
    names = [*charts(), *OWN]
    for name in names:
        write_table(tmp_path / f"{name}.csv", 16)
    plots = [{f"{name}.csv": {"template": name, "x": "x", "y": "y", "title": f"a chart: {name}"}} for name in names]
    YAML(typ="safe", pure=True).dump({"plots": plots}, tmp_path / "dvc.yaml")
    folder = repository(tmp_path)
    for name in names:
        write_table(tmp_path / f"{name}.csv", 12)
    run(folder, "dvc", "plots", "diff", "HEAD", "workspace", "--out", "page")
    shown = opened(folder / "page/index.html")
    assert len(shown) == len(names)
    for name, heading, marks, text in shown:
        assert heading == "a chart" and marks > 0, name
        if name != "differences_csv":  # there they stand one over the other, in the order of the command
            assert "HEAD" in text and "workspace" in text, f"{name}: {text}"


def test_panels_by_two_columns_keep_the_order_in_which_they_are_named_right():
    for name, template in charts().items():
        facet = template.get("facet", {})
        if {"row", "column"} <= facet.keys():
            assert not any("sort" in side for side in facet.values()), name
