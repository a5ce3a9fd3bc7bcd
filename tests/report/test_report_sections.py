"""Each part of the report appears where there is something to show, and only there."""

import dataclasses
import re

import numpy as np
import pytest
from report_example import NAME, draw_strips, material, measured
from test_report import check_page

from regvit.report.sections import Material, report


@pytest.fixture(scope="module")
def made(tmp_path_factory) -> Material:
    return material(tmp_path_factory.mktemp("metrics"))


@pytest.fixture(scope="module")
def whole(made) -> str:
    return report(made)


def headings(text: str) -> list[str]:
    return re.findall(r"<h2>([^<]*)</h2>", text)


def bare(made: Material, **kept: bool) -> Material:
    """The same without measurements; `kept` names stages that stay."""
    runs = [
        dataclasses.replace(
            run,
            found={stage: found for stage, found in run.found.items() if stage in kept},
            tables={key: table for key, table in run.tables.items() if key[0] in kept},
        )
        for run in made.runs
    ]
    return dataclasses.replace(made, runs=runs)


def test_the_page_is_sound_and_escapes_every_name(whole):
    check_page(whole)
    assert "&lt;script&gt;alert" in whole


def test_the_bytes_depend_on_the_metrics_alone(made, whole):
    assert report(made) == whole


def test_every_part_is_there_and_pictures_come_first(whole):
    assert headings(whole) == [
        "Before and after", "What registers change", "Self-checks", "What was run", "Outliers and their neurons",
        "Attention", "What single tokens know", "Object discovery", "Segmentation", "Depth",
        "Classification and anomalies", "Sweeps", "Make it again", "Words",
    ]  # fmt: skip


def test_what_was_not_measured_has_no_part(made):
    assert headings(report(dataclasses.replace(bare(made), sweeps=()))) == [
        "Before and after", "What registers change", "Self-checks", "What was run", "Outliers and their neurons",
        "Classification and anomalies", "Make it again", "Words",
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("stage", "title"),
    [("attention", "Attention"), ("tokens", "What single tokens know"), ("discover", "Object discovery"), ("depth", "Depth")],
)  # fmt: skip
def test_one_measurement_brings_its_own_part(made, stage, title):
    assert set(headings(report(bare(made, **{stage: True})))) - set(headings(report(bare(made)))) == {title}


def test_a_folder_without_pictures_makes_a_page_without_pictures(made, tmp_path):
    text = report(dataclasses.replace(made, folder=tmp_path))
    assert "<img" not in text
    assert "Before and after" not in headings(text)


def test_the_cured_run_is_shown_first_beside_its_reference(whole):
    assert set(re.findall(r'id="(\w+(?:-\w+)*)-2" checked', whole)) == {"models", "maps-scenes", "boxes-scenes"}
    assert 'data-under="boxes-scenes-1-picture"' in whole


def test_the_verdict_of_the_checks_stands_at_the_top(made, whole):
    assert '<p class="fail">1 of 1 self-checks failed.</p>' in whole
    passed = [dataclasses.replace(made.checks[0], value=0.95)]
    assert '<p class="pass">All 1 self-checks hold.</p>' in report(dataclasses.replace(made, checks=passed))


def test_a_run_without_a_measurement_leaves_a_gap_in_the_table_and_no_error(made):
    runs = [dataclasses.replace(made.runs[0], found={}, tables={}), *made.runs[1:]]
    text = report(dataclasses.replace(made, runs=runs))
    assert headings(text) == headings(report(made))


def test_pictures_share_the_room_so_that_many_runs_do_not_swell_the_page(made, tmp_path, monkeypatch):
    asked = []

    def take(path, alternative, limit, attributes=""):
        asked.append(limit)
        return f"<img {attributes}>"

    monkeypatch.setattr("regvit.report.page.picture", take)
    report(made)
    assert asked == [30_000] * 6
    asked.clear()
    report(material(tmp_path, extra=2))
    assert asked == [18_000] * 10


def test_models_are_compared_by_the_names_of_the_runs_that_they_are(whole):
    panes = re.findall(r'<label for="models-\d">(.*?)</label>', whole)
    cured = "&lt;script&gt;alert(&quot;a&quot;)&lt;/script&gt; &amp; $x_1$"
    assert panes == ["intact", "intact → original", f"original → {cured}", f"intact → {cured}"]


def test_a_model_that_no_run_is_has_a_name_that_says_what_it_is(made):
    text = report(dataclasses.replace(made, runs=made.runs[2:]))
    assert '<label for="models-0">without registers → ' in text
    assert '<label for="models-1">before planting → ' in text


def test_a_run_that_is_its_backbone_as_it_came_is_compared_with_its_reference(made, tmp_path):
    rng = np.random.default_rng(0)
    for name in ("intact", "trained"):
        draw_strips(tmp_path / "verify" / name, [name], rng)
    trained = measured("trained", "trained", reference="intact", outliers=False)
    text = report(dataclasses.replace(made, runs=[made.runs[0], trained], folder=tmp_path))
    assert '<label for="models-1">intact → trained</label>' in text


def test_a_sweep_has_a_plot_a_column_and_its_caption(whole):
    assert "<h3>Sweep sizes</h3>" in whole
    assert 'aria-label="cls_cosine (verify) by setting"' in whole


def test_runs_and_data_sets_are_named(whole):
    assert "&lt;script&gt;" in whole and NAME not in whole
    assert "1 at test time" in whole
    assert "the same classes, another look" in whole
