import dataclasses
import json

import numpy as np
import pytest
from safetensors.numpy import save_file

from regvit.features.tensor_file import DiskArray
from regvit.probing import predictions as module
from regvit.probing.predictions import (
    METADATA_KEY,
    Predictions,
    image_keys,
    load_predictions,
    paired_difference,
    save_predictions,
)
from regvit.probing.probes import InvalidProbes
from regvit.stats.accuracy import paired_accuracy_difference

FIRST = np.array([[3, 1, 2], [3, 1, 2], [0, 0, 1]], dtype=np.float32)


@pytest.fixture
def predictions():
    logits = np.stack([FIRST, -FIRST])  # two seeds
    scores = np.array([[0.5, np.inf, 1e-300]])
    return Predictions(
        logits={
            ("cls", "home"): logits,
            ("cls", "away"): logits,
            ("cls", "alien"): logits,
            ("a_mean", "home"): -logits,
            ("a_mean", "away"): logits,
        },
        labels={"home": np.array([0, 1, 2]), "away": np.array([2, 1, 2]), "alien": np.full(3, -1)},
        allowed={"home": (0, 1, 2), "away": (1, 2)},
        classes=("ant", "bee", "çat"),
        digests={"home": "h" * 64, "away": "a" * 64, "alien": "x" * 64},
        images={"home": image_keys("uvw"), "away": image_keys("xvw"), "alien": image_keys("rst")},
        other={("knn", "cls", "home"): FIRST, ("logistic", "cls", "home"): -FIRST},
        scores={("vim", "cls", "home"): np.concatenate([scores, -scores]), ("knn", "cls", "home"): scores},
    )


def test_saved_predictions_come_back_as_they_were(predictions, tmp_path):
    for name in ("one", "two"):
        save_predictions(tmp_path / name, predictions)
    loaded = load_predictions(tmp_path / "one")
    assert (tmp_path / "one").read_bytes() == (tmp_path / "two").read_bytes()
    assert loaded.readouts == ("cls", "a_mean") and loaded.classifiers("cls") == ("knn", "logistic")
    assert loaded.classifiers("a_mean") == ()
    for key in ("allowed", "classes", "digests"):
        assert getattr(loaded, key) == getattr(predictions, key)
    assert all(isinstance(values, DiskArray) for values in (*loaded.logits.values(), *loaded.other.values()))
    for kind in ("logits", "labels", "images", "other", "scores"):
        ours, theirs = getattr(predictions, kind), getattr(loaded, kind)
        assert set(ours) == set(theirs)
        assert all(ours[key].dtype == theirs[key].dtype and np.array_equal(ours[key], theirs[key]) for key in ours)
    for kind in ("logits", "other", "scores"):
        assert list(getattr(predictions, kind)) == list(getattr(loaded, kind))


def test_only_classes_that_the_data_set_has_are_predicted(predictions):
    assert predictions.correct("cls", "home").tolist() == [[True, False, True], [False, True, False]]
    first, second = predictions.correct("cls", "away").tolist()  # class 0 is not among those of `away`
    assert first == [True, False, True] and second == [False, True, False]


def test_loaded_predictions_are_as_right_and_the_file_may_go_meanwhile(predictions, tmp_path, monkeypatch):
    save_predictions(tmp_path / "x", predictions)
    loaded = load_predictions(tmp_path / "x")
    (tmp_path / "x").unlink()
    monkeypatch.setattr(module, "LOGITS_AT_ONCE", 4)  # an image at once
    for dataset in ("home", "away"):
        expected = predictions.correct("cls", dataset)
        assert loaded.correct("cls", dataset).tolist() == expected.tolist()
    assert loaded.correct("cls", "home", "knn").tolist() == predictions.correct("cls", "home", "knn").tolist()


def test_logits_are_gone_through_once(predictions, monkeypatch):
    calls, top1_correct = [], module.top1_correct
    monkeypatch.setattr(module, "top1_correct", lambda *given: calls.append(1) or top1_correct(*given))
    first = predictions.correct("cls", "home")
    assert predictions.correct("cls", "home") is first and len(calls) == 2  # seeds
    with pytest.raises(ValueError, match="read-only"):
        first[0, 0] = False


def test_other_classifiers_have_one_row(predictions):
    assert predictions.correct("cls", "home", "knn").tolist() == [[True, False, True]]
    assert predictions.correct("cls", "home", "logistic").tolist() == [[False, True, False]]


def test_anomalies_are_neither_right_nor_wrong(predictions):
    with pytest.raises(ValueError, match=r"data set 'alien' has no labels \(an anomaly set\)"):
        predictions.correct("cls", "alien")


def test_what_was_not_predicted_is_named(predictions):
    with pytest.raises(ValueError, match="no predictions of cls/elsewhere; there are cls/home, cls/away"):
        predictions.correct("cls", "elsewhere")
    with pytest.raises(ValueError, match="no predictions of knn/a_mean/home; there are knn/cls/home, logistic/cls"):
        predictions.correct("a_mean", "home", "knn")


def test_runs_are_compared_image_by_image_and_seed_by_seed(predictions):
    difference = paired_difference(predictions, "cls", predictions, "a_mean", ["home"])
    assert (difference.only_a, difference.only_b, difference.n) == (3, 3, 3)


def test_several_sets_are_pooled_and_images_of_the_same_name_kept_together(predictions):
    found = paired_difference(predictions, "cls", predictions, "a_mean", ["home", "away"])
    correct = [
        np.concatenate([predictions.correct(name, dataset) for dataset in ("home", "away")], axis=1)
        for name in ("cls", "a_mean")
    ]
    assert found == paired_accuracy_difference(*correct, groups=np.array([1, 2, 3, 4, 2, 3])) and found.n == 6


def test_the_same_name_has_the_same_key_and_others_have_others():
    keys = image_keys(["a", "b", "a"])
    assert keys.dtype == np.int64 and keys[0] == keys[2] != keys[1]


def test_runs_on_different_data_are_not_compared(predictions):
    other = dataclasses.replace(predictions, digests=predictions.digests | {"home": "z" * 64})
    with pytest.raises(ValueError, match=r"manifest hhhhhhhhhhhh… in one run and zzzzzzzzzzzz… in the other"):
        paired_difference(predictions, "cls", other, "cls", ["home"])
    assert paired_difference(predictions, "cls", other, "cls", ["away"]).value == 0


def test_a_missing_or_foreign_file_is_refused(tmp_path):
    with pytest.raises(FileNotFoundError, match="run the evaluate stage"):
        load_predictions(tmp_path / "none")
    (tmp_path / "text").write_text("hello")
    with pytest.raises(InvalidProbes, match="is no safetensors file"):
        load_predictions(tmp_path / "text")
    save_file({"x": FIRST}, str(tmp_path / "other"))
    with pytest.raises(
        InvalidProbes, match="has no 'regvit_predictions' in its metadata; expected a file of predictions"
    ):
        load_predictions(tmp_path / "other")


def test_a_file_of_an_older_format_is_refused(tmp_path):
    save_file({"cls/home": FIRST}, str(tmp_path / "old"), metadata={METADATA_KEY: json.dumps({"keys": []})})
    with pytest.raises(
        InvalidProbes, match="has predictions format None, this version reads 2; run the evaluate stage"
    ):
        load_predictions(tmp_path / "old")
