"""Figures and paired differences of predictions whose answers are known."""

import dataclasses

import numpy as np
import pytest
from made_predictions import all_sets, made_probes
from sklearn.metrics import roc_auc_score

from regvit.features.readouts import InMemory
from regvit.measures.detectors import DETECTORS, Detectors
from regvit.measures.evaluation import base_readout, evaluate, paired_differences, readout_pairs, roc_table
from regvit.measures.prediction import predict
from regvit.probing.predictions import Predictions
from regvit.stats.accuracy import accuracy, paired_accuracy_difference


@pytest.fixture(scope="module")
def predictions():
    return predict("original", *made_probes(), all_sets(), Detectors(DETECTORS))


@pytest.fixture(scope="module")
def figures(predictions):
    return evaluate(predictions, 100, 3)


def one(table, **keys):
    """The one row with these keys."""
    for key, value in keys.items():
        table = table[table[key] == value]
    assert len(table) == 1, table
    return table.iloc[0]


def test_accuracies_are_means_over_the_seeds_of_every_classifier_and_set(figures, predictions):
    found = one(figures, dataset="away", readout="cls", classifier="linear")
    expected = accuracy(predictions.correct("away", "cls"))
    assert (found["value"], found["lo"], found["hi"], found["n"]) == dataclasses.astuple(expected)
    knn = one(figures, dataset="home", readout="cls", classifier="knn")
    assert knn["value"] == predictions.correct("home", "cls", "knn").mean()
    top1 = figures[figures["metric"] == "top1"]
    assert set(top1["dataset"]) == {"home", "away", "far", "ood"} and len(top1) == 4 * (3 + 1)
    both = np.concatenate([predictions.correct(name, "cls") for name in ("away", "far")], axis=1)
    ood = one(top1, dataset="ood", readout="cls", classifier="linear")
    assert (ood["value"], ood["n"]) == (both.mean(), 75)


def test_the_mean_over_anomaly_sets_weighs_them_alike(figures):
    keys = {"readout": "cls", "detector": "vim", "metric": "auroc"}
    each = [one(figures, dataset=name, **keys)["value"] for name in ("alien", "noise")]
    mean = one(figures, dataset="anomalies", **keys)
    assert mean["value"] == pytest.approx(np.mean(each)) and mean["n"] == 65


def test_without_other_sets_there_are_only_accuracies():
    home = {"home": all_sets()["home"]}
    predictions = predict("original", *made_probes(), home, Detectors(("msp",)))
    assert set(evaluate(predictions)["metric"]) == {"top1"} and roc_table(predictions).empty
    assert set(paired_differences(predictions, "cls", predictions, "cls")["dataset"]) == {"home"}


# --- differences


def test_images_of_the_same_name_in_several_ood_sets_are_kept_together(predictions):
    found = one(
        paired_differences(predictions, "cls_reg_learned", predictions, "cls", 100), dataset="ood", metric="top1"
    )
    correct = [np.concatenate([predictions.correct(name, each) for name in ("away", "far")], axis=1)
               for each in ("cls_reg_learned", "cls")]  # fmt: skip
    groups = np.r_[np.arange(45), np.arange(30)]  # made_set names the images of every set alike
    expected = paired_accuracy_difference(*correct, groups)
    assert (found["difference"], found["lo"], found["p"]) == (expected.value, expected.lo, expected.p)
    assert expected.lo != paired_accuracy_difference(*correct).lo


def test_a_readout_is_compared_with_the_same_or_else_with_cls(predictions):
    index = predictions.index
    cls_only = dataclasses.replace(index, classifiers=tuple(key for key in index.classifiers if key[0] == "cls"))
    other = Predictions(cls_only, predictions.group)
    assert readout_pairs(predictions, other) == [("cls", "cls"), ("cls_reg_learned", "cls")]
    assert readout_pairs(other, predictions) == [("cls", "cls")]
    assert readout_pairs(predictions, predictions) == [("cls_reg_learned", "cls")]
    bases = ("cls", "cls_reg_learned", "cls_patch")  # cls_patch: none has it
    assert readout_pairs(predictions, predictions, bases) == [("cls", "cls_reg_learned"), ("cls_reg_learned", "cls")]
    assert readout_pairs(other, predictions, bases) == [("cls", "cls")]
    reg_only = dataclasses.replace(
        index, classifiers=tuple(key for key in index.classifiers if key[0] == "cls_reg_learned")
    )
    pairs = readout_pairs(Predictions(cls_only, predictions.group), Predictions(reg_only, predictions.group), bases)
    assert pairs == [("cls", "cls_reg_learned")]
    assert base_readout(("patch_mean", "cls")) == "cls" and base_readout(("patch_mean", "reg_mean")) == "patch_mean"


def test_the_interval_of_a_difference_is_paired(predictions, figures):
    closer = {
        name: dataclasses.replace(
            each, features=InMemory({key: each.features.read(key) * np.float32(0.99) for key in each.features.arrays})
        )
        for name, each in all_sets().items()
    }
    other = predict("closer", *made_probes(), closer, Detectors(DETECTORS))
    keys = {"dataset": "alien", "detector": "energy", "metric": "auroc"}
    found = one(paired_differences(other, "cls", predictions, "cls", 100, 3), **keys)
    alone = one(figures, readout="cls", **keys)
    assert (found["run"], found["reference"]) == ("closer", "original")
    assert found["hi"] - found["lo"] < 0.2 * (alone["hi"] - alone["lo"])


def test_runs_on_other_images_are_not_compared(predictions):
    index = predictions.index
    sets = index.sets | {"noise": dataclasses.replace(index.sets["noise"], digest="z" * 64)}
    other = Predictions(dataclasses.replace(index, run="other", sets=sets), predictions.group)
    with pytest.raises(ValueError, match="data set 'noise' has manifest nnnnnnnnnnnn… in run 'original' and zzzzzzzzz"):
        paired_differences(predictions, "cls", other, "cls")
    fewer = dataclasses.replace(index, sets={"home": index.sets["home"]})
    with pytest.raises(
        ValueError, match="run 'original' was evaluated on home, away, alien, far, noise and 'original'"
    ):
        paired_differences(predictions, "cls", Predictions(fewer, predictions.group), "cls")


# --- plots


def test_the_roc_has_every_anomaly_set_and_detector(predictions):
    table = roc_table(predictions)
    assert len(table.groupby(["dataset", "detector"])) == 2 * len(DETECTORS) and set(table["readout"]) == {"cls"}
    curve = table[(table["dataset"] == "alien") & (table["detector"] == "vim")]
    scores = np.r_[tuple(predictions.scores(name, "cls", "vim")[0] for name in ("home", "alien"))]
    expected = roc_auc_score(np.repeat([0, 1], [60, 40]), scores)
    assert np.trapezoid(curve["tpr"], curve["fpr"]) == pytest.approx(expected, abs=0.01)
