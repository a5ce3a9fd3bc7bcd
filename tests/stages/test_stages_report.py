"""What the stage reads: the measurements that params.yaml asks for, and a missing one is an error with its cure."""

import csv
import json
import sys
from pathlib import Path

import pytest

from regvit.report.compare import Measured

sys.path.insert(0, str(Path(__file__).parent.parent.parent / "stages"))

from regvit.pipeline.read_tables import TABLES, read_measurements
from report import read_search

RUNS = [Measured(name, "none", 0, {}, {}, {}) for name in ("first", "second")]


@pytest.fixture
def params(tmp_path, monkeypatch) -> dict:
    """Parameters for which every metrics file lies in the working directory."""
    monkeypatch.chdir(tmp_path)
    params = {stage: {"datasets": ["scenes"]} for stage in TABLES} | {
        "zeroshot": {"runs": ["second"], "datasets": ["scenes"]},
        "in_distribution": "home",
        "runs": {"first": {"backbone": "vit"}, "second": {"backbone": "planted"}},
    }
    for stage, tables in TABLES.items():
        for run in ("first", "second"):
            folder = tmp_path / "metrics" / stage / run / "scenes"
            folder.mkdir(parents=True)
            folder.with_suffix(".json").write_text(json.dumps({"stage": stage, "run": run}))
            for table in tables:
                with open(folder / f"{table}.csv", "w", newline="") as file:
                    csv.writer(file).writerows([["image_id", "value"], [f"{stage} {run}, {table}", ""]])
    for run in ("first", "second"):
        (tmp_path / "metrics/verify" / run).mkdir(parents=True)
        (tmp_path / "metrics/verify" / run / "images.csv").write_text(f"image_id,cls_cosine\nof {run},0.9\n")
    return params


def test_each_run_gets_its_own_metrics_and_tables(params):
    first, second = read_measurements(params, RUNS)
    assert (first.backbone, second.backbone) == ("vit", "planted")
    assert second.of("depth", "scenes") == {"stage": "depth", "run": "second"}
    assert second.tables["depth", "scenes", "images"] == {"image_id": ["depth second, images"], "value": [""]}
    assert set(first.found) == set(TABLES) - {"zeroshot"}  # asked for the second run only
    assert set(second.found) == set(TABLES)
    assert second.tables["verify", "home", "images"] == {"image_id": ["of second"], "cls_cosine": ["0.9"]}


def test_what_is_not_asked_for_is_not_read_though_its_files_lie_there(params):
    params["depth"]["datasets"] = []
    first, _ = read_measurements(params, RUNS)
    assert first.found["depth"] == {}
    assert ("depth", "scenes", "images") not in first.tables


def test_a_measurement_that_is_asked_for_and_missing_is_an_error_with_its_cure(params):
    params["segment"]["datasets"] = ["scenes", "relief"]
    with pytest.raises(SystemExit, match=r"there is no metrics/segment/first/relief\.json: run `dvc repro` first"):
        read_measurements(params, RUNS)


def test_the_search_is_read_with_its_tables(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    folder = tmp_path / "metrics/identify/vit"
    folder.mkdir(parents=True)
    folder.with_suffix(".json").write_text('{"threshold": null}')
    for name in ("norms", "histogram", "scores"):
        (folder / f"{name}.csv").write_text("layer,value\n0,1.5\n1,2\n" if name == "norms" else "rank\n")
    found = read_search("vit")
    assert found.threshold is None
    assert found.norms == {"layer": [0.0, 1.0], "value": [1.5, 2.0]}
    assert found.scores == {"rank": []}
