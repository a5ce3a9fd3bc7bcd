"""Plots take the page's colours, are the same each time, and hold against runs that lack what is plotted."""

import re
import xml.etree.ElementTree as ElementTree

import numpy as np
import pytest
from report_example import NAME, search

from regvit.report.comparisons import Value
from regvit.report.plots import (
    INK,
    Curve,
    plot_histogram,
    plot_layers,
    plot_norms,
    plot_places,
    plot_points,
    plot_scores,
    plot_settings,
)

SEARCH = search()
CURVE = Curve([0, 1, 2], [0.1, 0.2, np.nan], [0.0, 0.1, np.nan], [0.2, 0.3, np.nan])
NOTHING = Curve((), (), (), ())
POINTS = {NAME: [Value(0.5, 0.4, 0.6), None], "_hidden": [Value(0.2), Value(0.1, 0.0, 0.2)]}
PLOTS = {
    "norms": lambda: plot_norms(SEARCH.norms),
    "histogram": lambda: plot_histogram(SEARCH.histogram, 20.0),
    "scores": lambda: plot_scores(SEARCH.scores),
    "layers": lambda: plot_layers({NAME: CURVE, "none": NOTHING}, NAME),
    "points": lambda: plot_points([NAME, "b"], POINTS, "top-1, %", 100),
    "settings": lambda: plot_settings([NAME, "b"], [Value(0.5, 0.4, 0.6), None], NAME),
    "places": lambda: plot_places([0.5, 0, 0, 0.1]),
    "no neurons": lambda: plot_scores(search(False).scores),
    "no threshold": lambda: plot_histogram(SEARCH.histogram, None),
    "no runs": lambda: plot_points([], {}, ""),
}


@pytest.mark.parametrize("name", PLOTS)
def test_a_plot_is_one_element_in_the_colour_of_the_text(name):
    svg = PLOTS[name]()
    ElementTree.fromstring(svg.replace("xlink:", ""))  # well-formed
    assert svg.startswith('<svg role="img" aria-label="')
    assert "currentColor" in svg and INK not in svg
    assert "<script" not in svg and "<style" not in svg and "font-family" not in svg


@pytest.mark.parametrize("name", PLOTS)
def test_the_bytes_are_the_same_each_time_and_have_no_date(name):
    assert PLOTS[name]() == PLOTS[name]()
    assert not re.search(r"20\d\d-\d\d-\d\d|matplotlib", PLOTS[name]())


def test_identifiers_are_referred_to_and_shared_by_no_two_plots():
    seen = set()
    for name, plot in PLOTS.items():
        svg = plot()
        ids, referred = set(re.findall(r' id="([^"]+)"', svg)), set(re.findall(r'(?:url\(#|href="#)([^)"]+)', svg))
        assert ids == referred, name
        assert not ids & seen, name
        seen |= ids


def test_text_stays_as_it_is_and_numbers_in_it_keep_their_digits():
    svg = plot_layers({"0.123456": CURVE}, "share 1.98765")
    assert ">0.123456</text>" in svg
    assert ">share 1.98765</text>" in svg
    assert not re.search(r'd="[^"]*\d\.\d{3}', svg)


def test_names_are_no_formulas_and_are_not_hidden():
    assert "alert(&quot;a&quot;)" in PLOTS["points"]() or 'alert("a")' in PLOTS["points"]()
    assert "$x_1$" in PLOTS["points"]()
    assert ">hidden</text>" in PLOTS["points"]()


def test_a_point_stands_where_its_value_is_and_runs_keep_their_colours():
    svg = plot_points(["a"], {"x": [None], "y": [Value(0.25, 0.2, 0.3)]}, "label", 100)
    assert "#e0783b" in svg and "#5b8fd0" not in svg  # the second colour, though the first run has no value
    ticks = {text: float(x) for x, text in re.findall(r'<text [^>]*? x="([\d.]+)" [^>]*>(\d+)</text>', svg)}
    low, high = min(ticks, key=float), max(ticks, key=float)
    point = float(
        re.findall(r'<use xlink:href="[^"]*" x="([\d.]+)" [^>]*fill: #e0783b', svg)[0]
    )  # the second is the legend's
    expected = ticks[low] + (25 - float(low)) / (float(high) - float(low)) * (ticks[high] - ticks[low])
    assert point == pytest.approx(expected, abs=0.1)
