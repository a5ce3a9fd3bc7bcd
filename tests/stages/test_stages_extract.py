"""The stages that extract: what their record says, and what they find when they are run again."""

import json
import shutil

import pytest
from ruamel.yaml import YAML
from trust_project import Stages, make_project

RECORD = "metrics/extract/cured/home.json"


@pytest.fixture(scope="module")
def stages():
    with Stages() as running:
        yield running


@pytest.fixture(scope="module")
def extracted(stages, tmp_path_factory):
    """A project after `extract cured home`."""
    folder = make_project(tmp_path_factory.mktemp("project"))
    for stage in (("download", "home"), ("backbone", "tiny"), ("identify", "tiny"), ("compose", "cured")):
        stages.finish(folder, *stage)
    stages.finish(folder, "extract", "cured", "home")
    return folder


@pytest.fixture
def project(extracted, tmp_path):
    return shutil.copytree(extracted, tmp_path / "project")


def change(folder, block, **values):
    """Sets values of a block of params.yaml."""
    yaml = YAML()
    params = yaml.load(folder / "params.yaml")
    params[block].update(values)
    yaml.dump(params, folder / "params.yaml")


def test_a_finished_store_whose_record_is_missing_gets_it_without_being_made_again(stages, project):
    record = (project / RECORD).read_bytes()
    (project / RECORD).unlink()
    written = (project / "features/cured/home.zarr/zarr.json").stat().st_mtime_ns
    ended = stages.finish(project, "extract", "cured", "home")
    assert "features/cured/home.zarr is finished; only its record was missing" in ended.text
    assert (project / RECORD).read_bytes() == record
    assert (project / "features/cured/home.zarr/zarr.json").stat().st_mtime_ns == written


def test_a_finished_store_with_its_record_is_not_written_over(stages, project):
    ended = stages.run(project, "extract", "cured", "home")
    assert ended.status == 1 and "extract: features/cured/home.zarr exists; delete it to extract it again" in ended.text


def test_a_finished_store_of_other_settings_is_not_taken_for_this_one(stages, project):
    (project / RECORD).unlink()
    change(project, "extract", precision="bfloat16")
    stages.finish(project, "compose", "cured")
    ended = stages.run(project, "extract", "cured", "home")
    assert ended.status == 1 and "features/cured/home.zarr exists; delete it" in ended.text
    assert not (project / RECORD).exists()


def test_a_damaged_store_without_a_record_is_not_taken_for_a_finished_one(stages, project):
    (project / RECORD).unlink()
    shutil.rmtree(project / "features/cured/home.zarr/patch_mean")
    ended = stages.run(project, "extract", "cured", "home")
    assert ended.status == 1 and "features/cured/home.zarr exists; delete it" in ended.text


def test_the_record_says_how_images_were_resized_where_it_was_not_by_pillow(stages, project):
    before = json.loads((project / RECORD).read_text())[0]
    assert "resizing" not in before["transform"]
    shutil.rmtree(project / "features/cured/home.zarr")
    (project / RECORD).unlink()
    change(project, "extract", resizing="torch")
    stages.finish(project, "compose", "cured")
    ended = stages.run(project, "extract", "cured", "home")
    assert ended.status == 0, ended.text
    after = json.loads((project / RECORD).read_text())[0]
    assert after["transform"] == before["transform"] | {"resizing": "torch"}
    assert after["store_sha256"] != before["store_sha256"]


def test_a_wrong_knob_is_one_line(stages, project):
    (project / "runtime.yaml").write_text("compile: maybe\n")
    ended = stages.run(project, "extract", "cured", "home")
    assert ended.status == 1 and "compile (runtime.yaml) is 'maybe', expected one of true, false, auto" in ended.text
    assert "Traceback" not in ended.text
