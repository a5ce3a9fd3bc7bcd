"""A run's row of figures: short, flat, four digits, and nothing that was not measured."""

import dataclasses

from regvit.report.results import Place
from regvit.report.study import Value
from regvit.report.summary import headlines, summary

MOST = 16


def test_at_most_sixteen_figures_of_four_digits(results):
    figures = summary(results, "cured")
    assert list(figures) == ["outliers", "cls_cosine", "on_outliers", "morans_i", "corloc", "miou", "rmse", "top1", "ood_top1", "ood_pair", "auroc", "fpr95"]  # fmt: skip
    assert len(figures) <= MOST
    assert all(round(value, 4) == value for value in figures.values())


def test_what_was_not_measured_is_left_out(results):
    figures = summary(results, "intact")
    assert not {"outliers", "cls_cosine", "on_outliers", "ood_pair"} & set(figures)
    assert figures["morans_i"] == 0.42


def test_several_data_sets_are_one_mean_without_interval(results):
    place = Place("segment", "miou", "rooms")
    study = dataclasses.replace(results.study, measured={**results.study.measured, "segment": ("scenes", "rooms")})
    more = dataclasses.replace(
        results, study=study, figures={**results.figures, ("cured", place): Value(0.73, 0.7, 0.76)}
    )
    assert headlines(more, "cured")["miou"] == Value(0.63)
    assert headlines(results, "cured")["miou"].lo is not None


def test_the_names_fit_a_terminal_beside_the_longest_path(results):
    """As `dvc metrics show` lays them out."""
    width = len("metrics/test_time_reg.json") + sum(max(len(name) + 4, 8) for name in summary(results, "cured"))
    assert width <= 160
