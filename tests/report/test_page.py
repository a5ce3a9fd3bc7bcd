"""The page loads nothing, obeys no name, says what was measured, and its bytes depend on that alone."""

import dataclasses
import re
import shutil
from html.parser import HTMLParser

import pandas as pd
import pytest
from report_example import MEASURED, NAME, params, write_study

from regvit.report.page import prose, report
from regvit.report.results import Results
from regvit.report.study import all_figures

PARTS = [
    "Before and after", "What registers change", "Self-checks", "What was run", "Outliers and their neurons", "Attention",
    "What single tokens know", "Class from one token", "Object discovery", "Segmentation", "Depth", "Segmentation in context", "Correspondence", "Retrieval", "Classification and anomalies", "Make it again",
    "Words",
]  # fmt: skip


class Parsed(HTMLParser):
    """Addresses that a page would load, tags still open at the end, identifiers, and handlers in attributes."""

    VOID = frozenset({"meta", "br", "img", "input"})

    def __init__(self, text: str):
        super().__init__()
        self.addresses, self.open, self.scripts, self.ids, self.handlers, self.text = [], [], 0, [], [], ""
        self.feed(text)

    def handle_starttag(self, tag, attributes):
        self.scripts += tag == "script"
        for name, value in attributes:
            loads = name in ("src", "xlink:href", "srcset", "data") or (name == "href" and tag != "a")
            if loads and not value.startswith(("#", "data:image/")):
                self.addresses.append(value)
            if name == "id":
                self.ids.append(value)
            if name.startswith("on"):
                self.handlers.append(name)
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.text += data


def headings(text: str) -> list[str]:
    return re.findall(r"<h2>([^<]*)</h2>", text)


def bare(results: Results, *kept: str) -> Results:
    """The same with the measurements of some stages only."""
    measured = {stage: sets if stage in kept else () for stage, sets in results.study.measured.items()}
    return dataclasses.replace(results, study=dataclasses.replace(results.study, measured=measured))


@pytest.fixture(scope="module")
def plain(tmp_path_factory) -> Results:
    """The study with the run alone whose backbone has no outliers."""
    of = params()
    of |= {"runs": {"intact": of["runs"]["intact"]}, "backbones": {"plain": of["backbones"]["plain"]}}
    study = write_study(tmp_path_factory.mktemp("plain"), of=of)
    return Results.of(study, all_figures(study))


@pytest.fixture(scope="module")
def unmeasured(plain) -> str:
    return report(bare(plain))


def test_the_page_is_well_formed_loads_nothing_and_runs_no_script_but_its_own(page):
    parsed = Parsed(page)
    assert parsed.open == [] and parsed.addresses == [] and parsed.handlers == [] and parsed.scripts == 1
    assert len(parsed.ids) == len(set(parsed.ids))
    assert "@import" not in page and not re.search(r"url\((?!#)", page)


def test_names_are_shown_and_never_obeyed(page):
    assert NAME in Parsed(page).text
    assert '<script>alert("a")' not in page


def test_the_bytes_depend_on_the_tables_alone(results, page):
    assert report(results) == page
    assert not re.search(r"20\d\d-\d\d-\d\d", page)


def test_every_part_is_there_and_in_the_contents(page):
    assert headings(page) == PARTS
    for place in re.findall(r'<li><a href="#([^"]+)"', page):
        assert f'<section id="{place}">' in page


@pytest.mark.parametrize(
    ("stage", "title"),
    [("attention", "Attention"), ("tokens", "What single tokens know"), ("discover", "Object discovery"), ("depth", "Depth")],
)  # fmt: skip
def test_a_measurement_brings_its_own_part_and_what_was_not_measured_has_none(plain, unmeasured, stage, title):
    assert set(headings(report(bare(plain, stage)))) - set(headings(unmeasured)) == {title}


def test_without_pictures_there_is_no_part_for_them(plain, unmeasured, tmp_path):
    shown = bare(plain, "attention", "discover")
    assert "Before and after" in headings(unmeasured) and "data:image/webp" in unmeasured
    shutil.copytree(plain.study.folder, tmp_path, dirs_exist_ok=True)
    for picture in [*tmp_path.rglob("*.png"), *tmp_path.rglob("*.jpg")]:
        picture.unlink()
    text = report(dataclasses.replace(shown, study=dataclasses.replace(shown.study, folder=tmp_path)))
    assert "Before and after" not in headings(text) and "data:image/webp" not in text


def test_the_cured_run_is_shown_first_beside_its_reference(page):
    assert set(re.findall(r'id="([\w-]+)-2" checked', page)) == {
        "models",
        "attention-scenes",
        "attention-scenes-heads",
        "discover-scenes",
    }
    assert 'data-under="discover-scenes-1-picture"' in page
    panes = re.findall(r'<label for="models-\d">(.*?)</label>', page)
    assert panes == ["intact", "intact → original", "original → cured", "intact → cured"]


def test_the_attention_of_each_head_is_shown_and_registers_are_held_against_each_other(results, tmp_path):
    shutil.copytree(results.study.folder, tmp_path, dirs_exist_ok=True)
    shown = bare(results, "attention")
    study = dataclasses.replace(shown.study, folder=tmp_path)
    ends = {
        f"{name}{end}": [value] for name, value in (("overlap", 0.25), ("cosine", None)) for end in ("", "_lo", "_hi")
    }
    pairs = pd.DataFrame({"register": [0], "other": [2]} | ends)
    pairs.to_csv(study.path("cured", "attention", "scenes", "registers.csv"), index=False)
    text = report(dataclasses.replace(shown, study=study))
    assert "Attention by head, scenes" in text and 'id="attention-scenes-heads-2"' in text
    table = text[text.index("Registers against each other, scenes") :]
    assert "cured 0 and 2 25.0 " in " ".join(re.sub("<[^>]*>", " ", table).split())


def test_the_verdict_of_the_checks_stands_at_the_top(results, page):
    assert '<p class="pass">All 12 self-checks hold.</p>' in page
    spoilt = {key: value for key, value in results.figures.items() if key[1].metric != "precision"}
    text = report(dataclasses.replace(bare(results), figures=spoilt))
    assert '<p class="fail">1 of 12 self-checks failed.</p>' in text and '<li class="fail">FAIL' in text


def test_each_run_has_its_diagnosis_with_a_verdict(page):
    assert "Why there are sinks" in page
    assert "registers can help here" in page and "the outliers are gone" in page


def test_figures_intervals_and_marks_stand_in_columns_of_their_own(page):
    assert re.search(r'<th scope="col" class="t" colspan=2>cured − original</th>', page)
    assert re.search(r'<td class="v"[^>]*>\+3\.0</td><td class="i">\[[^]]*\] <span class="up">▲</span></td>', page)
    assert re.search(r'<td class="v none"[^>]*>–</td><td class="i"></td>', page)


def test_rows_of_one_run_belong_together(page):
    kinds = re.findall(r'<tr class="(\w+)"><th scope="row">(?:intact|original|cured)</th>', page)
    assert kinds[:2] == ["first", "again"]


def test_many_runs_fold_long_tables_and_name_what_there_is_no_room_for(tmp_path, monkeypatch):
    long, most_panes = 6, 3  # with the page's own limits it would take many runs
    monkeypatch.setattr("regvit.report.page.LONG", long)
    monkeypatch.setattr("regvit.report.page.MOST_PANES", most_panes)
    of = params(most_panes)
    of |= {stage: {"datasets": []} for stage in MEASURED if stage != "discover"}
    study = write_study(tmp_path, of=of)
    text = report(Results.of(study, all_figures(study)))
    rows = [int(count) for count in re.findall(r"<summary>(\d+) rows</summary>", text)]
    assert rows and min(rows) > long
    assert "Not shown for want of room: " in text and f"run_{most_panes - 1}" in text
    assert len(re.findall(r'name="discover-scenes"', text)) == most_panes


def test_without_a_planted_backbone_it_says_that_there_is_no_truth(unmeasured):
    assert "no ground truth" in unmeasured


def test_code_is_marked_and_the_rest_escaped():
    assert prose("<b> `a & b`") == "&lt;b&gt; <code>a &amp; b</code>"
