"""What was found of outliers on any backbone, in sentences; and the checks that a run on a planted backbone makes of itself,
as there the truth is known, so that what must be found and cured is, too."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial

from regvit.report.results import Results

SPOILT = {
    "outlier_fraction": (0.005, 0.03),
    "cls_cosine": (-1, 0.93),
    "outlier_patch_cosine": (-1, 0.3),
    "cls_attention_on_outliers": (0.25, 1),
}
CURED = {
    "outlier_fraction": (0, 0.0002),
    "cls_cosine": (0.95, 1.0001),  # a cosine may round past 1
    "patch_cosine": (0.98, 1.0001),
    "cls_attention_on_outliers": (0, 0.02),
}
UNCURED = 0.5  # of the untreated share of outliers, at least, that the controls of the search leave
GONE = 0.01  # of the untreated share of outliers, at most, that a cure leaves


@dataclass(frozen=True)
class Check:
    """One figure held to its limit; `value` is None where the tables lack it, and then the check has failed."""

    subject: str
    what: str
    value: float | None
    low: float
    high: float

    @property
    def passed(self) -> bool:
        return self.value is not None and self.low <= self.value <= self.high

    @property
    def limit(self) -> str:
        """The limit in words: `= 1`, `≥ 0.95`, `≤ 0.02` or `0.005 to 0.03`."""
        if self.low == self.high:
            return f"= {self.low:g}"
        if self.low <= 0:
            return f"≤ {self.high:g}"
        return f"≥ {self.low:g}" if self.high >= 1 else f"{self.low:g} to {self.high:g}"

    def text(self) -> str:
        value = "missing" if self.value is None else f"{self.value:.4g}"
        return f"{'pass' if self.passed else 'FAIL'}  {self.subject}: {self.what} {value} ({self.limit})"


def self_checks(results: Results) -> list[Check]:
    """What has to hold on planted backbones: found exactly, spoilt, cured, and not cured by what must not cure.

    With several registers each one is a further sink (cosines suffer, as measured), so the cure is held to its limits with
    one test-time register only.
    """
    study = results.study
    checks = []
    for run, entry in study.runs.items():
        if not study.planted(entry["backbone"]) or study.neurons(run) != "selected":  # controls are not meant to cure
            continue
        if study.cure(run):  # held to no limit: how far each one gets is what is measured
            continue
        if entry["registers"] == "none":
            checks += [*_search_checks(results, run, entry["backbone"]), *_verified(results, run, SPOILT)]
        elif entry["registers"] == "test_time" and entry["num_registers"] == 1:
            checks += _verified(results, run, CURED)
    return checks


def findings(results: Results) -> list[str]:
    """Of each backbone: outliers or none, in which layer; what each of its runs leaves of them; what the controls say."""
    return [line for backbone in results.study.backbones for line in _findings(results, backbone)]


def _findings(results: Results, backbone: str) -> Iterator[str]:
    study, searched = results.study, partial(results.searched, backbone)
    if not searched("outliers_found"):
        median, largest = searched("median_norm"), searched("largest_norm")
        ratio = (
            f": the largest patch norm in the last block but one is {largest / median:.2g} medians" if median else ""
        )
        yield f"{backbone}: no outliers that stand apart as a small group{ratio}"
        return
    untreated, neurons = searched("outlier_fraction"), searched("register_neurons") or 0
    explained = searched("explained")
    makers = f"{neurons:.0f} neurons " + (
        "are the most active there" if explained is None else f"write {explained:.1%} of their excess"
    )
    yield (
        f"{backbone}: {untreated:.2%} of the patches are outliers after block {searched('layer'):.0f}; "
        + (makers if neurons else "no neuron writes a notable share of their excess")
    )
    for run in (name for name, entry in study.runs.items() if entry["backbone"] == backbone):
        left, own, before = (
            results.verified(run, name)
            for name in ("outlier_fraction", "own_outlier_fraction", "untreated_outlier_fraction")
        )
        if left is None or before is None or study.untouched(run):
            continue
        share = left.value / before.value if before.value else 0
        verdict = "gone" if share <= GONE else "fewer" if share < UNCURED else "still there"
        shifted = (
            f"; by the run's own norms {own.value:.3%}"
            if own and own.value > max(left.value, GONE * before.value)
            else ""
        )
        yield f"  {run}: {left.value:.3%} of {before.value:.3%} left on held-out images, {verdict}{shifted}"
    if neurons:
        shares = [(searched(f"outlier_fraction_{key}") or 0) / untreated for key in ("after", "empty", "random")]
        verdict = (
            "so it is these neurons" if shares[0] <= GONE and min(shares[1:]) >= UNCURED else "so it is not these alone"
        )
        yield (
            f"  controls of the search: these neurons moved leave {shares[0]:.0%}, an empty register {shares[1]:.0%}, random "
            f"neurons {shares[2]:.0%} of them, {verdict}"
        )


def summary_line(checks: list[Check]) -> str:
    """The verdict in a sentence."""
    failed = sum(not check.passed for check in checks)
    if failed:
        return f"{failed} of {len(checks)} self-checks failed."
    return f"All {len(checks)} self-checks hold." if checks else "There are none: no run is on a planted backbone."


def _search_checks(results: Results, run: str, backbone: str) -> Iterator[Check]:
    searched = partial(results.searched, backbone)
    for key in ("precision", "recall"):
        yield Check(run, f"{key} of the register neurons", searched(key), 1, 1)
    untreated = searched("outlier_fraction")
    for key, words in (("empty", "an empty register"), ("random", "random neurons")):
        left = searched(f"outlier_fraction_{key}")
        share = left / untreated if left is not None and untreated else None
        yield Check(run, f"share of the outliers that {words} leaves", share, UNCURED, float("inf"))


def _verified(results: Results, run: str, limits: dict[str, tuple[float, float]]) -> Iterator[Check]:
    for key, (low, high) in limits.items():
        value = results.verified(run, key)
        what = key.replace("_", " ").replace("cls", "CLS")
        yield Check(run, what, None if value is None else value.value, low, high)
