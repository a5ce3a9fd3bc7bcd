import numpy as np
import pytest

from regvit.predictions import Predictions, load_predictions, paired_difference, save_predictions
from regvit.probes import InvalidProbes


@pytest.fixture
def predictions():
    logits = np.array([[3, 1, 2], [3, 1, 2], [0, 0, 1]], dtype=np.float32)
    return Predictions(
        logits={
            ("cls", "home"): logits,
            ("cls", "away"): logits,
            ("cls", "alien"): logits,
            ("a_mean", "home"): -logits,
        },
        labels={"home": np.array([0, 1, 2]), "away": np.array([2, 1, 2]), "alien": np.full(3, -1)},
        allowed={"home": (0, 1, 2), "away": (1, 2)},
        classes=("ant", "bee", "çat"),
        digests={"home": "h" * 64, "away": "a" * 64, "alien": "x" * 64},
    )


def test_saved_predictions_come_back_as_they_were(predictions, tmp_path):
    for name in ("one", "two"):
        save_predictions(tmp_path / name, predictions)
    loaded = load_predictions(tmp_path / "one")
    assert (tmp_path / "one").read_bytes() == (tmp_path / "two").read_bytes()
    assert list(loaded.logits) == list(predictions.logits) and loaded.readouts == ("cls", "a_mean")
    for key in ("allowed", "classes", "digests"):
        assert getattr(loaded, key) == getattr(predictions, key)
    assert all(np.array_equal(loaded.logits[key], predictions.logits[key]) for key in predictions.logits)
    assert all(np.array_equal(loaded.labels[key], predictions.labels[key]) for key in predictions.labels)


def test_only_classes_that_the_data_set_has_are_predicted(predictions):
    assert predictions.correct("cls", "home").tolist() == [True, False, True]
    assert predictions.correct("cls", "away").tolist() == [True, False, True]  # class 0 is not among those of `away`


def test_anomalies_are_neither_right_nor_wrong(predictions):
    with pytest.raises(ValueError, match=r"data set 'alien' has no labels \(an anomaly set\)"):
        predictions.correct("cls", "alien")
    with pytest.raises(ValueError, match="no predictions of 'cls' on 'elsewhere'; there are cls/home, cls/away"):
        predictions.correct("cls", "elsewhere")


def test_runs_are_compared_image_by_image(predictions):
    difference = paired_difference(predictions, "cls", predictions, "a_mean", "home")
    assert (difference.only_a, difference.only_b, difference.n) == (2, 1, 3)


def test_runs_on_different_data_are_not_compared(predictions):
    other = Predictions(predictions.logits, predictions.labels, predictions.allowed, predictions.classes,
                        predictions.digests | {"home": "z" * 64})  # fmt: skip
    with pytest.raises(ValueError, match=r"manifest hhhhhhhhhhhh… in one run and zzzzzzzzzzzz… in the other"):
        paired_difference(predictions, "cls", other, "cls", "home")


def test_a_missing_or_foreign_file_is_refused(tmp_path):
    with pytest.raises(FileNotFoundError, match="run the evaluate stage"):
        load_predictions(tmp_path / "none")
    (tmp_path / "text").write_text("hello")
    with pytest.raises(InvalidProbes, match="is no safetensors file"):
        load_predictions(tmp_path / "text")
