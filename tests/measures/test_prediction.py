"""Predictions of made-up features whose answers are known."""

import dataclasses

import numpy as np
import pytest
from made_predictions import CLASSES, all_sets, is_test, made_probes, made_set

from regvit.features.readouts import readout
from regvit.measures.detectors import DETECTORS, Detectors, fit
from regvit.measures.evaluation import confusion_table
from regvit.measures.prediction import predict
from regvit.probing import predictions as predictions_module
from regvit.probing.neighbours import Labelled, knn_logit_blocks
from regvit.probing.probes import Neighbours


@pytest.fixture(scope="module")
def sets():
    return all_sets()


@pytest.fixture(scope="module")
def probes():
    return made_probes()


@pytest.fixture(scope="module")
def predictions(probes, sets):
    return predict("original", *probes, sets, Detectors(DETECTORS))


def logits(predictions, dataset, name, classifier="linear"):
    ((_, found),) = predictions.logit_blocks(dataset, name, classifier)
    return found


def test_every_seed_and_classifier_predicts_the_test_images_of_every_set(predictions, probes, sets):
    for name, each in sets.items():
        features = readout(each.features, "cls_reg_learned")[is_test(each)]
        expected = [probe.logits(features) for probe in probes[0].probes["cls_reg_learned"]]
        assert np.allclose(logits(predictions, name, "cls_reg_learned"), expected, atol=1e-5)
        assert logits(predictions, name, "cls").shape == (3, sum(is_test(each)), 3)
    assert predictions.classifiers("cls") == ("linear", "logistic", "knn")
    assert predictions.classifiers("cls_reg_learned") == ("linear",)
    home, away = (sets[name].features.read("cls") for name in ("home", "away"))
    ((_, votes),) = knn_logit_blocks(Labelled(home[:90], np.arange(90) % 3), away[5:], Neighbours(7, 0.07), 3)
    assert np.allclose(logits(predictions, "away", "cls", "knn")[0], votes, atol=1e-5)


def test_labels_are_matched_by_name_and_classes_that_a_set_lacks_are_not_predicted(predictions):
    about = predictions.index.sets
    assert predictions.labels("away")[:4].tolist() == [2, 1, 0, 2] and set(about["away"].allowed) == {0, 1, 2}
    assert about["far"].allowed == (2, 0) and set(predictions.labels("alien").tolist()) == {-1}
    assert list(about) == ["home", "away", "alien", "far", "noise"]
    assert predictions.index.run == "original" and predictions.index.classes == CLASSES


def test_detectors_are_fitted_on_the_training_images_for_each_seed(predictions, probes, sets):
    home, alien = sets["home"], sets["alien"]
    train, test = readout(home.features, "cls_reg_learned")[:90], readout(alien.features, "cls_reg_learned")
    for seed, probe in enumerate(probes[0].probes["cls_reg_learned"]):
        for detector in DETECTORS:
            score = fit(detector, probe.embed(train), np.arange(90) % 3, probe)
            expected = score(probe.embed(test), probe.logits(test))
            found = predictions.scores("alien", "cls_reg_learned", detector)[seed]
            assert found == pytest.approx(expected, rel=1e-4)


def test_what_no_probe_has_a_part_in_is_scored_once_and_ood_sets_not_at_all(predictions):
    lengths = {detector: len(predictions.scores("home", "cls", detector)) for detector in DETECTORS}
    assert [name for name, seeds in lengths.items() if seeds == 1] == ["knn", "mahalanobis", "relative_mahalanobis"]
    pooled = [len(predictions.scores("home", "cls_reg_learned", name)) for name in DETECTORS]
    assert set(pooled) == {3}  # by each seed
    with pytest.raises(KeyError):
        predictions.scores("away", "cls", "msp")


def test_predictions_on_disk_are_those_in_memory_in_whatever_blocks(predictions, probes, sets, tmp_path, monkeypatch):
    told = []
    monkeypatch.setattr(predictions_module, "LOGITS_AT_ONCE", 3 * 5)  # five images at once
    found = predict("original", *probes, sets, Detectors(DETECTORS), tmp_path / "x.zarr", told.append)
    assert told == ["cls", "cls_reg_learned"]
    for name in sets:
        for readout_name in predictions.readouts:
            for classifier in predictions.classifiers(readout_name):
                blocks = [each for _, each in found.logit_blocks(name, readout_name, classifier)]
                assert max(each.shape[1] for each in blocks) == 5
                whole = np.concatenate([e for _, e in predictions.logit_blocks(name, readout_name, classifier)], 1)
                np.testing.assert_allclose(np.concatenate(blocks, 1), whole, atol=1e-5)
                if name in ("home", "away", "far"):
                    ours, theirs = (each.correct(name, readout_name, classifier) for each in (found, predictions))
                    assert ours.tolist() == theirs.tolist()
    for detector in DETECTORS:
        ours, theirs = (each.scores("alien", "cls", detector) for each in (found, predictions))
        np.testing.assert_allclose(ours, theirs, rtol=1e-4, atol=1e-5)
    assert sorted(confusion_table(found).value_counts()) == sorted(confusion_table(predictions).value_counts())


def test_faults_are_told_before_any_features_are_read(probes, sets):
    def refused(name, said, **changes):
        unreadable = {key: dataclasses.replace(each, features=None) for key, each in sets.items()}
        dataset = dataclasses.replace(sets[name].dataset, **changes)
        with pytest.raises(ValueError, match=said):
            predict(
                "r",
                *probes,
                unreadable | {name: dataclasses.replace(unreadable[name], dataset=dataset)},
                Detectors(("msp",)),
            )

    rows = sets["away"].dataset.rows
    refused("alien", "data set 'alien' has no images in its test split; give some of them split", rows=())
    refused("home", "data set 'home' has no images in its train split", rows=sets["home"].dataset.subset("test").rows)
    unlabelled = (*rows[:-1], dataclasses.replace(rows[-1], label=""))
    refused("away", "data set 'away' has 1 images without a label in the test split", rows=unlabelled)
    refused("far", r"data set 'far': 1 of 3 classes are unknown to the probe \('yak'\)", classes=("cat", "ant", "yak"))
    with pytest.raises(ValueError, match=r"0 data sets have the role id \(none\); expected one"):
        predict("r", *probes, {"alien": sets["alien"]}, Detectors(("msp",)))
    single = sets | {"far": made_set("far", "ood", {"test": 3}, classes=("cat",))}
    with pytest.raises(ValueError, match="data set 'far' has the single class 'cat'; only the classes that a set has"):
        predict("r", *probes, single, Detectors(("msp",)))
