"""The report is one page that loads nothing, and its bytes depend on the metrics alone."""

import re
from html.parser import HTMLParser

import pytest
from PIL import Image

from regvit.compare import Check, Measured, Table
from regvit.report import (
    check_list,
    figures,
    page,
    picture,
    plot_accuracy,
    plot_histogram,
    plot_norms,
    plot_scores,
    table,
)

NAME = '<script>alert("a")</script> & $x_1$'
NORMS = {"layer": [0, 1, 2], "median": [1.0, 2.0, 3.0], "max": [2.0, 30.0, 60.0]}
HISTOGRAM = {"log10_norm": [0.0, 1.0, 2.0], "before": [5, 0, 2], "after": [7, 0, 0]}
SCORES = {"rank": [1, 2, 3], "attribution": [0.6, 0.3, 0.01], "selected": [1, 1, 0]}
TOP1 = {"top1": 0.6, "top1_lo": 0.55, "top1_hi": 0.66}


def run(name: str) -> Measured:
    return Measured(name, "none", 0, {"cls": {"id": TOP1, "ood": {NAME: TOP1}}}, {}, {})


def whole_page() -> str:
    plots = [
        plot_norms(NORMS), plot_histogram(HISTOGRAM, 20.0), plot_scores(SCORES),
        plot_accuracy([run("original"), run(NAME)], "plain", [NAME]),
    ]  # fmt: skip
    sections = [
        (NAME, table(Table(NAME, ("run", NAME), ((NAME, "1"),)))),
        ("checks", check_list([Check(NAME, "cosine", 0.5, 0.9, 1)])),
        ("plots", figures([(NAME, plot) for plot in plots])),
    ]
    return page(NAME, sections)


class Loads(HTMLParser):
    """Collects the addresses that a page would load, and its tags that are still open at the end."""

    VOID = frozenset({"meta", "br", "img"})

    def __init__(self):
        super().__init__()
        self.addresses, self.open, self.scripts = [], [], 0

    def handle_starttag(self, tag, attributes):
        self.scripts += tag == "script"
        self.addresses += [v for k, v in attributes if k in ("src", "href", "xlink:href") and not v.startswith("#")]
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attributes):
        self.addresses += [v for k, v in attributes if k in ("src", "href", "xlink:href") and not v.startswith("#")]

    def handle_endtag(self, tag):
        assert self.open.pop() == tag


def test_the_page_loads_nothing_and_is_well_formed():
    parser = Loads()
    parser.feed(whole_page())
    assert parser.addresses == []
    assert parser.open == []
    assert "@import" not in whole_page()
    assert not re.search(r"url\((?!#)", whole_page())


def test_names_are_shown_and_never_obeyed():
    parser = Loads()
    parser.feed(whole_page())
    assert parser.scripts == 0
    assert "&lt;script&gt;alert" in whole_page()


def test_the_bytes_are_the_same_each_time():
    assert whole_page() == whole_page()
    assert not re.search(r"20\d\d-\d\d-\d\d", whole_page())


def test_the_plots_take_the_colour_of_the_text_so_that_they_show_in_the_dark():
    plot = plot_norms(NORMS)
    assert "currentColor" in plot
    assert "#010203" not in plot
    assert "prefers-color-scheme: dark" in whole_page()


@pytest.mark.parametrize(
    "plot",
    [
        lambda: plot_scores({"rank": [], "attribution": [], "selected": []}),
        lambda: plot_histogram(HISTOGRAM, None),
        lambda: plot_accuracy([], "plain", []),
    ],
)
def test_a_plot_of_a_model_without_outliers_is_still_a_plot(plot):
    assert plot().rstrip().endswith("</svg>")


def test_a_failed_check_stands_out():
    assert '<li class="fail">FAIL  run: cosine 0.5 (≥ 0.9)</li>' in check_list([Check("run", "cosine", 0.5, 0.9, 1)])
    assert "no ground truth" in check_list([])


def test_a_picture_lies_inside_the_page(tmp_path):
    Image.new("RGB", (2, 2), "red").save(tmp_path / "a.png")
    assert picture(tmp_path / "a.png", 'a "b"').startswith('<img src="data:image/png;base64,iVBOR')
    assert 'alt="a &quot;b&quot;"' in picture(tmp_path / "a.png", 'a "b"')
