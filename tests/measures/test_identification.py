import dataclasses

import numpy as np
import pytest

from regvit import find_register_neurons
from regvit.measures import identification
from regvit.measures.identification import (
    figures,
    histogram_table,
    moved_figures,
    moved_table,
    norm_table,
    norms_under_treatments,
    score_table,
    sentence,
)
from regvit.registers.neurons_file import NeuronsFile
from regvit.registers.planting import plant


@pytest.fixture(scope="module")
def searched(tiny_vit, noise_images):
    """A planted tiny model, what the search found in it, and the norms under every treatment."""
    model, images = tiny_vit(1), noise_images(48)
    truth = plant(model, images, seed_layer=2, amplifier_layer=3, fraction=0.05, edit_keys=True).neurons
    found = find_register_neurons(model, images)
    return found, norms_under_treatments(model, [images], found, seed=0), truth


def fraction(found, norms):
    return (norms > found.detection.threshold).mean()


def test_outliers_go_with_the_neurons_and_stay_with_an_empty_register_or_random_neurons(searched):
    found, treated, _ = searched
    before = found.outlier_fraction.mean()
    assert before > 0.01
    assert fraction(found, treated["ablated"]) == fraction(found, treated["after"]) == 0
    for control in ("empty", "random"):
        assert fraction(found, treated[control]) == pytest.approx(before, rel=0.15)


def test_the_figures_have_each_fraction_with_its_interval_and_the_truth(searched):
    found, treated, truth = searched
    shown = {one.metric: one for one in figures(found, treated, truth, seed=0)}
    assert shown["precision"].value == shown["recall"].value == shown["outliers_found"].value == 1
    for name in ("", "_ablated", "_after", "_empty", "_random"):
        one = shown[f"outlier_fraction{name}"]
        assert one.lo <= one.value <= one.hi
    assert shown["outlier_fraction"].value == pytest.approx(found.outlier_fraction.mean())
    half = {layer: [*units[:1], 63] for layer, units in truth.items()}
    assert {one.metric: one.value for one in figures(found, treated, half, seed=0)}["recall"] == 0.5


def test_the_tables_count_every_patch_and_mark_selected_and_planted_neurons(searched):
    found, treated, truth = searched
    assert norm_table(found)["layer"].tolist() == list(range(len(found.norms)))
    assert norm_table(found)["max"].tolist() == [each.max() for each in found.norms]
    histogram = histogram_table(found, treated)
    assert histogram[["before", "after"]].sum().tolist() == [found.norms[0].size] * 2
    scores = score_table(found, truth)
    assert list(scores) == ["rank", "layer", "neuron", "attribution", "activation", "selected", "planted"]
    marked = scores[scores["selected"] == 1]
    assert len(marked) == found.num_selected and marked["planted"].all()


def test_controls_see_no_more_than_the_first_images_and_the_histogram_counts_as_many_before(
    searched, tiny_vit, noise_images, monkeypatch
):
    found, treated, _ = searched
    monkeypatch.setattr(identification, "CONTROL_IMAGES", 12)
    model, images = tiny_vit(1), noise_images(48)
    plant(model, images, seed_layer=2, amplifier_layer=3, fraction=0.05, edit_keys=True)
    few = norms_under_treatments(model, images.split(5), found, seed=0)
    for name, norms in few.items():
        assert norms.shape == (12, 64)
        assert np.allclose(norms, treated[name][:12], rtol=1e-5)
    counts = histogram_table(found, few)
    assert counts["after"].sum() == 12 * 64
    assert counts["before"].sum() == pytest.approx(12 * 64, abs=10)  # each of 60 bins is rounded


def test_a_search_that_went_through_all_images_twice_says_so(searched):
    found, treated, truth = searched
    shown = figures(found, treated, truth, seed=0)
    assert "twice" not in sentence("tiny", found, shown)  # 48 images, no more than are looked at first
    found = dataclasses.replace(found, again=100, outlier_fraction=np.full(100, 0.01))
    text = sentence("tiny", found, shown)
    assert "all images were gone through twice, as they contradict the first 64" in text


def test_the_sentence_says_what_is_left_under_each_treatment(searched):
    found, treated, truth = searched
    text = sentence("tiny", found, figures(found, treated, truth, seed=0))
    assert "register neurons write" in text and "precision 1, recall 1" in text
    assert "outliers left: 0.00% with one test-time register, 0.00% with the neurons silenced" in text


def test_of_no_neurons_there_is_no_precision(searched):
    found, _, truth = searched
    none = dataclasses.replace(found, selected={})
    shown = figures(none, {}, truth, seed=0)
    values = {one.metric: one.value for one in shown}
    assert values["precision"] is None and values["recall"] == 0
    assert "precision –, recall 0" in sentence("tiny", none, shown)


def test_a_model_without_outliers_gets_no_treatment_and_says_so(tiny_vit, noise_images):
    model, images = tiny_vit(1), noise_images(8)
    found = find_register_neurons(model, images)
    assert norms_under_treatments(model, [images], found, seed=0) == {}
    shown = figures(found, {}, None, seed=0)
    values = {one.metric: one.value for one in shown}
    assert values["outliers_found"] == 0 and values["threshold"] is None and "recall" not in values
    assert sentence("plain", found, shown).startswith("plain: no outliers (largest patch norm")
    assert len(score_table(found, None)) == 0
    histogram = histogram_table(found, {})
    assert (histogram["before"] == histogram["after"]).all()  # nothing was treated


def test_neurons_found_are_those_that_the_run_itself_takes():
    searched = NeuronsFile({3: (5, 7), 4: (1,)}, ranks={(3, 5): 1, (4, 1): 2, (3, 7): 3, (3, 9): 4})
    (one,) = moved_figures({"neurons": {"3": [5, 9]}}, searched)
    assert (one.metric, one.value, one.n) == ("found_neurons", 1 / 3, 3)
    assert moved_figures({"neurons": {}}, searched)[0].value == 0
    assert moved_figures({"neurons": None}, searched) == moved_figures({"neurons": {"3": [5]}}, NeuronsFile({})) == []
    rows = moved_table({"neurons": {"3": [5, 8, 9]}}, searched).fillna(0).values.tolist()
    assert rows == [[3, 5, 1, 1, 1], [4, 1, 0, 1, 2], [3, 7, 0, 1, 3], [3, 9, 1, 0, 4], [3, 8, 1, 0, 0]]
