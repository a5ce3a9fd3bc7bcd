"""Predictions, metrics and differences of made-up features whose answers are known."""

import dataclasses

import numpy as np
import pytest
from sklearn.metrics import roc_auc_score

from regvit.data.manifest import Dataset, Row
from regvit.features.readouts import InMemory, readout
from regvit.features.tensor_file import DiskArray
from regvit.measures import evaluation
from regvit.measures.detectors import DETECTORS, energy, fit
from regvit.measures.evaluation import (
    Plan,
    TestSet,
    base_readout,
    compared,
    confusion_rows,
    difference_rows,
    differences_between,
    differences_within,
    draw,
    evaluate,
    predict,
    roc_rows,
    rounded,
)
from regvit.probing import predictions as predictions_module
from regvit.probing.neighbours import Neighbours, knn_logit_blocks
from regvit.probing.predictions import paired_difference
from regvit.probing.probes import Probe, ProbeSet
from regvit.stats.accuracy import accuracy
from regvit.stats.anomaly_metrics import fpr95

CLASSES = ("ant", "bee", "cat")
CENTRES = np.random.default_rng(0).normal(size=(3, 6))
PLAN = Plan("home", ("away", "far"), ("alien", "noise"), DETECTORS, bootstrap=100, seed=3)


def made_set(name, role, counts, shift=0.0, classes=CLASSES, seed=0):
    """A data set whose CLS tokens lie about the centres of their classes, with two registers that are CLS and noise."""
    rng = np.random.default_rng([seed, len(name)])
    rows, cls = [], []
    for split, count in counts.items():
        for i in range(count):
            label = classes[i % len(classes)] if role != "anomaly" else ""
            rows.append(Row(f"{split}{i}", f"{i}.png", label, split))
            centre = CENTRES[CLASSES.index(label)] if label in CLASSES else 3 * rng.normal(size=6)
            cls.append(centre + shift + 0.8 * rng.normal(size=6))
    cls = np.array(cls, dtype=np.float32)
    registers = np.stack([cls, rng.normal(size=cls.shape).astype(np.float32)], axis=1)
    dataset = Dataset(name, None, () if role == "anomaly" else classes, tuple(rows), name[0] * 64)
    return TestSet(dataset, role, InMemory({"cls": cls, "registers": registers}))


def all_sets(seed=0):
    home = made_set("home", "id", {"train": 90, "val": 6, "test": 60}, seed=seed)
    away = made_set("away", "ood", {"train": 5, "test": 45}, 0.5, ("cat", "bee", "ant"), seed)
    far = made_set("far", "ood", {"test": 30}, 1.0, ("cat", "ant"), seed)
    anomalies = {
        name: made_set(name, "anomaly", {"test": count}, seed=seed) for name, count in [("alien", 40), ("noise", 25)]
    }
    return {"home": home, "away": away, "alien": anomalies["alien"], "far": far, "noise": anomalies["noise"]}


def made_probes(seeds=3):
    """Probes as good as the centres allow, a little different for each seed; one readout pools its registers."""
    rng = np.random.default_rng(1)

    def probe(name, repeat, seed, pool=None):
        weight = np.tile(CENTRES, (1, repeat)).astype(np.float32) + rng.normal(0, 0.1, (3, 6 * repeat)).astype(
            np.float32
        )
        bias = (-0.5 * repeat * (CENTRES**2).sum(1)).astype(np.float32)
        return Probe(name, weight, bias, 0.1, 5, seed, pool=pool, n_registers=0 if pool is None else len(pool))

    probes = {
        "cls": tuple(probe("cls", 1, s) for s in range(seeds)),
        "cls_reg_learned": tuple(
            probe("cls_reg_learned", 2, s, np.array([1.0 + s, -1.0], dtype=np.float32)) for s in range(seeds)
        ),
    }
    return ProbeSet(
        probes, CLASSES, (0.1,), 10, 8, 0.0, 0.9, "cosine", True, tuple(range(seeds)), 90, 6,
        logistic={"cls": probe("cls", 1, None)}, knn={"cls": Neighbours(7, 0.07, 5)},
    )  # fmt: skip


@pytest.fixture(scope="module")
def sets():
    return all_sets()


@pytest.fixture(scope="module")
def probes():
    return made_probes()


@pytest.fixture(scope="module")
def predictions(probes, sets):
    return predict(probes, sets, DETECTORS)


@pytest.fixture(scope="module")
def drawn(predictions):
    return draw(predictions, PLAN)


def is_test(sets):
    return [row.split == "test" for row in sets.dataset.rows]


# --- predictions


def test_every_seed_and_classifier_predicts_the_test_images_of_every_set(predictions, probes, sets):
    for name, each in sets.items():
        features = readout(each.features, "cls_reg_learned")[is_test(each)]
        expected = [probe.logits(features) for probe in probes.probes["cls_reg_learned"]]
        assert np.allclose(predictions.logits["cls_reg_learned", name], expected, atol=1e-5)
        assert predictions.logits["cls", name].shape == (3, sum(is_test(each)), 3)
    assert set(predictions.other) == {(kind, "cls", name) for kind in ("knn", "logistic") for name in sets}
    home, away = (sets[name].features.read("cls") for name in ("home", "away"))
    ((_, votes),) = knn_logit_blocks(home[:90], np.arange(90) % 3, away[5:], 7, 0.07, 3)
    assert np.allclose(predictions.other["knn", "cls", "away"], votes, atol=1e-5)


def test_labels_are_matched_by_name_and_classes_that_a_set_lacks_are_not_predicted(predictions):
    assert predictions.labels["away"][:4].tolist() == [2, 1, 0, 2] and set(predictions.allowed["away"]) == {0, 1, 2}
    assert predictions.allowed["far"] == (2, 0) and set(predictions.labels["alien"]) == {-1}
    assert list(predictions.labels) == ["home", "away", "alien", "far", "noise"]


def test_detectors_are_fitted_on_the_training_images_for_each_seed(predictions, probes, sets):
    home, alien = sets["home"], sets["alien"]
    train, test = readout(home.features, "cls_reg_learned")[:90], readout(alien.features, "cls_reg_learned")
    for seed, probe in enumerate(probes.probes["cls_reg_learned"]):
        for detector in DETECTORS:
            score = fit(detector, probe.embed(train), np.arange(90) % 3, probe)
            expected = score(probe.embed(test), probe.logits(test))
            assert predictions.scores[detector, "cls_reg_learned", "alien"][seed] == pytest.approx(expected, rel=1e-4)


def test_what_no_probe_has_a_part_in_is_scored_once_and_ood_sets_not_at_all(predictions):
    lengths = {detector: len(predictions.scores[detector, "cls", "home"]) for detector in DETECTORS}
    assert [name for name, seeds in lengths.items() if seeds == 1] == ["knn", "mahalanobis", "relative_mahalanobis"]
    assert all(
        len(predictions.scores[name, "cls_reg_learned", "home"]) == 3 for name in DETECTORS
    )  # pooled by each seed
    assert {dataset for _, _, dataset in predictions.scores} == {"home", "alien", "noise"}


def test_progress_is_told_after_each_readout(probes, sets):
    told = []
    predict(probes, sets, ["msp"], told.append)
    assert told == [1, 1]


def test_logits_on_disk_are_those_in_memory_in_whatever_blocks(predictions, probes, sets, tmp_path, monkeypatch):
    monkeypatch.setattr(evaluation, "TEST_ROWS", 16)
    monkeypatch.setattr(predictions_module, "LOGITS_AT_ONCE", 3 * 5)  # five images at once
    found = predict(probes, sets, DETECTORS, scratch=tmp_path)
    assert list(tmp_path.iterdir()) == []  # the file has no name
    for kind in ("logits", "other"):
        ours, theirs = getattr(found, kind), getattr(predictions, kind)
        assert list(ours) == list(theirs) and all(isinstance(values, DiskArray) for values in ours.values())
        for key in ours:
            np.testing.assert_allclose(np.asarray(ours[key]), theirs[key], atol=1e-5)
    assert list(found.scores) == list(predictions.scores)
    for key, values in found.scores.items():
        np.testing.assert_allclose(values, predictions.scores[key], rtol=1e-4, atol=1e-5)
    for name in ("home", "away", "far"):
        assert found.correct("cls", name).tolist() == predictions.correct("cls", name).tolist()
    assert list(confusion_rows(found, PLAN)) == list(confusion_rows(predictions, PLAN))


def test_neighbours_are_looked_for_on_the_device_that_is_given(probes, sets, monkeypatch):
    devices, blocks = [], evaluation.knn_logit_blocks
    monkeypatch.setattr(
        evaluation, "knn_logit_blocks", lambda *given: devices.append(given[-1]) or blocks(*given[:-1], "cpu")
    )
    predict(probes, sets, ["msp"], device="cuda:1")
    assert set(devices) == {"cuda:1"}


class Unreadable:
    """Features that fail the test if anything is read from them."""

    def __init__(self):
        self.arrays = {"cls": (6,)}

    def read(self, name):
        raise AssertionError("features were read before the check")


def refused(probes, sets, detectors=("msp",)):
    predict(probes, {name: dataclasses.replace(each, features=Unreadable()) for name, each in sets.items()}, detectors)


def test_faults_are_told_before_any_features_are_read(probes, sets):
    def with_rows(name, change):
        dataset = sets[name].dataset
        return sets | {name: dataclasses.replace(sets[name], dataset=change(dataset))}

    with pytest.raises(ValueError, match=r"detector 'mps' is unknown; did you mean 'msp'\?"):
        refused(probes, sets, ["mps"])
    empty = with_rows("alien", lambda d: dataclasses.replace(d, rows=()))
    with pytest.raises(ValueError, match="data set 'alien' has no images in its test split; give some of them split"):
        refused(probes, empty)
    no_train = with_rows("home", lambda d: d.subset("test"))
    with pytest.raises(ValueError, match="data set 'home' has no images in its train split"):
        refused(probes, no_train)
    unlabelled = with_rows(
        "away", lambda d: dataclasses.replace(d, rows=(*d.rows[:-1], dataclasses.replace(d.rows[-1], label="")))
    )
    with pytest.raises(ValueError, match="data set 'away' has 1 images without a label in the test split"):
        refused(probes, unlabelled)
    strange = with_rows("far", lambda d: dataclasses.replace(d, classes=("cat", "ant", "yak")))
    with pytest.raises(ValueError, match=r"data set 'far': 1 of 3 classes are unknown to the probe \('yak'\)"):
        refused(probes, strange)
    single = sets | {"far": made_set("far", "ood", {"test": 3}, classes=("cat",))}
    with pytest.raises(ValueError, match="data set 'far' has the single class 'cat'; only the classes that a set has"):
        refused(probes, single)
    with pytest.raises(ValueError, match=r"0 data sets have the role id \(none\); expected one"):
        refused(probes, {"alien": sets["alien"]})


# --- metrics


def test_accuracies_and_anomaly_metrics_are_means_over_the_seeds(drawn, predictions):
    table = evaluate(drawn, PLAN)
    assert list(table) == ["cls", "cls_reg_learned"]
    top1 = accuracy(predictions.correct("cls", "away"))
    assert table["cls"]["ood"]["away"] == {"top1": top1.value, "top1_lo": top1.lo, "top1_hi": top1.hi, "n": 45}
    assert table["cls"]["knn"]["id"]["top1"] == predictions.correct("cls", "home", "knn").mean()
    assert set(table["cls"]["logistic"]["ood"]) == {"away", "far"} and "knn" not in table["cls_reg_learned"]
    own, strange = (predictions.scores["energy", "cls", name] for name in ("home", "alien"))
    anomalous = np.repeat([0, 1], [60, 40])
    expected = np.mean([roc_auc_score(anomalous, np.r_[a, b]) for a, b in zip(own, strange, strict=True)])
    found = table["cls"]["anomaly"]["alien"]["energy"]
    assert found["auroc"] == pytest.approx(expected) and (found["n"], found["n_id"]) == (40, 60)
    assert found["fpr95"] == pytest.approx(np.mean([fpr95(a, b) for a, b in zip(own, strange, strict=True)]))
    assert own[0] == pytest.approx(energy(predictions.logits["cls", "home"][0]))


def test_every_figure_has_an_interval_around_it(drawn):
    def blocks(values):
        for value in values.values():
            if isinstance(value, dict):
                yield from [value] if "n" in value else blocks(value)

    found = list(blocks(evaluate(drawn, PLAN)))
    assert len(found) == 2 * (3 + 2 * len(DETECTORS) + len(DETECTORS)) + 2 * 3
    for block in found:
        figures = [name for name in block if f"{name}_lo" in block]
        assert figures and all(0 <= block[f"{n}_lo"] <= block[n] <= block[f"{n}_hi"] <= 1 for n in figures)


def test_the_mean_over_anomaly_sets_weighs_them_alike(drawn):
    table = evaluate(drawn, PLAN)["cls"]
    each = [table["anomaly"][name]["vim"]["auroc"] for name in ("alien", "noise")]
    assert table["anomaly_mean"]["vim"]["auroc"] == pytest.approx(np.mean(each))
    assert table["anomaly_mean"]["vim"]["n"] == 65


def test_without_anomaly_sets_there_is_nothing_to_average(predictions):
    plan = dataclasses.replace(PLAN, anomaly=())
    table = evaluate(draw(predictions, plan), plan)["cls"]
    assert table["anomaly"] == {} and "anomaly_mean" not in table


# --- differences


def test_each_readout_is_compared_with_cls_in_the_same_run(drawn, predictions):
    table = differences_within(drawn, PLAN)
    assert list(table) == ["cls_reg_learned-cls"]
    found = table["cls_reg_learned-cls"]
    expected = paired_difference(predictions, "cls_reg_learned", predictions, "cls", ["home"])
    assert found["id"] == {"top1": expected.value, "top1_lo": expected.lo, "top1_hi": expected.hi, "top1_p": expected.p,
                           "n": 60}  # fmt: skip
    pooled = paired_difference(predictions, "cls_reg_learned", predictions, "cls", ["home", "away", "far"])
    assert found["pooled"]["top1"] == pooled.value and found["pooled"]["n"] == 135
    metrics = evaluate(drawn, PLAN)
    for detector in DETECTORS:
        for sets in (["anomaly", "alien"], ["anomaly", "noise"], ["anomaly_mean"]):
            sides = [metrics["cls_reg_learned"], metrics["cls"], found]
            for step in (*sets, detector):
                sides = [side[step] for side in sides]
            a, b, difference = sides
            for metric in ("auroc", "fpr95"):
                assert difference[metric] == pytest.approx(a[metric] - b[metric])
                assert difference[f"{metric}_lo"] <= difference[metric] <= difference[f"{metric}_hi"]
                assert 0 < difference[f"{metric}_p"] <= 1


def test_a_readout_that_the_other_run_lacks_is_compared_with_its_cls(drawn):
    other = dataclasses.replace(
        drawn.predictions, logits={key: x for key, x in drawn.predictions.logits.items() if key[0] == "cls"}
    )
    assert list(differences_between(drawn, draw(other, PLAN), PLAN)) == ["cls-cls", "cls_reg_learned-cls"]
    assert list(differences_between(drawn, drawn, PLAN)) == ["cls-cls", "cls_reg_learned-cls_reg_learned"]


def test_a_run_does_not_differ_from_itself(drawn):
    same = compared(drawn, "cls", drawn, "cls", PLAN)
    assert (same["id"]["top1"], same["id"]["top1_p"]) == (0, 1)
    found = same["anomaly"]["alien"]["vim"]
    assert (found["auroc"], found["auroc_lo"], found["auroc_hi"], found["auroc_p"]) == (0, 0, 0, 1)


def test_the_interval_of_a_difference_is_paired(drawn, probes, sets):
    closer = {
        name: dataclasses.replace(
            each, features=InMemory({key: each.features.read(key) * np.float32(0.99) for key in each.features.arrays})
        )
        for name, each in sets.items()
    }
    other = draw(predict(probes, closer, DETECTORS), PLAN)
    difference = compared(other, "cls", drawn, "cls", PLAN)["anomaly"]["alien"]["energy"]
    alone = evaluate(drawn, PLAN)["cls"]["anomaly"]["alien"]["energy"]
    assert difference["auroc_hi"] - difference["auroc_lo"] < 0.2 * (alone["auroc_hi"] - alone["auroc_lo"])


def test_runs_on_other_images_are_not_compared(drawn):
    digests = drawn.predictions.digests | {"noise": "z" * 64}
    other = dataclasses.replace(drawn, predictions=dataclasses.replace(drawn.predictions, digests=digests))
    with pytest.raises(ValueError, match="data set 'noise' has manifest nnnnnnnnnnnn… in one run and zzzzzzzzzzzz…"):
        differences_between(drawn, other, PLAN)


def test_differences_as_rows_name_metric_set_and_detector(drawn):
    rows = list(difference_rows(compared(drawn, "cls", drawn, "cls", PLAN), PLAN))
    assert [row[:3] for row in rows[:4]] == [("top1", name, "") for name in ("home", "away", "far", "ID + OOD")]
    assert {row[1] for row in rows[4:]} == {"alien", "noise", "mean"} and {row[0] for row in rows[4:]} == {
        "auroc",
        "fpr95",
    }
    assert len(rows) == 4 + 3 * len(DETECTORS) * 2 and all(len(row) == 8 for row in rows)


def test_cls_is_the_base_or_else_the_first_readout():
    assert base_readout(("patch_mean", "cls")) == "cls" and base_readout(("patch_mean", "reg_mean")) == "patch_mean"


# --- plots


def test_the_confusions_are_of_every_seed(predictions):
    rows = list(confusion_rows(predictions, PLAN))
    assert len(rows) == 3 * 60
    assert sum(actual == predicted for actual, predicted in rows) == predictions.correct("cls", "home").sum()


def test_the_roc_has_every_anomaly_set_and_detector(predictions):
    rows = list(roc_rows(predictions, PLAN))
    assert {row[:2] for row in rows} == {(name, detector) for name in PLAN.anomaly for detector in DETECTORS}
    curve = np.array([row[2:] for row in rows if row[:2] == ("alien", "vim")])
    expected = roc_auc_score(
        np.repeat([0, 1], [60, 40]),
        np.r_[tuple(predictions.scores["vim", "cls", name][0] for name in ("home", "alien"))],
    )
    assert np.trapezoid(curve[:, 1], curve[:, 0]) == pytest.approx(expected, abs=0.01)


def test_floats_are_rounded_to_six_digits_and_whole_numbers_left():
    assert rounded({"a": {"b": 1 / 3}, "n": 7, "s": "x"}) == {"a": {"b": 0.333333}, "n": 7, "s": "x"}
