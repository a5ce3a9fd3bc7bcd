"""The short figures are those of the metrics."""

from report_example import measured

from regvit.report.compare import Measured
from regvit.report.comparisons import Measurements
from regvit.report.summary import summary


def test_each_run_has_its_figures_by_short_names():
    runs = [measured("original"), measured("cured", "test_time", reference="original", shift=0.1)]
    found = summary(runs, ["lines"], "msp")
    assert list(found) == ["original", "cured"]
    assert found["cured"] == {
        "outliers": 0.0, "cls_cosine": 1.0, "attention_on_outliers": 0.4, "coherence": 0.5, "corloc": 0.8, "miou": 0.6,
        "rmse": 0.7, "top1": 0.7, "ood_top1": 0.7,
    }  # fmt: skip


def test_what_a_backbone_has_not_is_left_out():
    (found,) = summary([measured("intact", outliers=False)], ["lines"], "msp").values()
    assert not {"outliers", "cls_cosine", "attention_on_outliers"} & found.keys()


def test_several_data_sets_are_told_apart_and_their_means_taken():
    def top1(value: float) -> dict:
        return {"top1": value}

    evaluate = {"cls": {"id": top1(0.5), "ood": {"a": top1(0.25), "b": top1(0.5)}, "anomaly_mean": {"msp": {"auroc": 0.8, "fpr95": 0.4}}}}  # fmt: skip
    run = Measured("r", "none", 0, evaluate, {"outliers_found": False}, {})
    found = {"segment": {"a": {"miou": 0.123456}, "b": {"miou": 0.5}}}
    assert summary([Measurements(run, "vit", found)], ["a", "b"], "msp") == {
        "r": {"miou_a": 0.1235, "miou_b": 0.5, "top1": 0.5, "ood_top1": 0.375, "auroc": 0.8, "fpr95": 0.4}
    }
