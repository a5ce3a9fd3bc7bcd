"""Local copies of hub repositories in the formats of the hub: parquet shards with embedded images, and image folders."""

import io
import json
import os
import re
from pathlib import Path

import datasets
import numpy as np
import pyarrow.parquet
import pytest
from PIL import Image

from regvit.data.packages import DownloadFailed
from regvit.data.sources.hub import HubSource

datasets.disable_progress_bars()


@pytest.fixture(autouse=True)
def offline(monkeypatch):
    """The hub is never asked."""
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)


def encoded(i: int, kind: str) -> bytes:
    file = io.BytesIO()
    Image.fromarray(np.random.default_rng(i).integers(0, 256, (6, 5, 3), dtype=np.uint8)).save(file, kind)
    return file.getvalue()


def shard(path: Path, labels: list[int], kind: str = "JPEG", first: int = 0, **more: list) -> list[bytes]:
    """A parquet shard as the hub converts image sets to: {bytes, path} and a class label; returns the files in it."""
    files = [encoded(first + i, kind) for i in range(len(labels))]
    features = {"image": datasets.Image(), "label": datasets.ClassLabel(names=["cat", "dog"])}
    features |= {name: datasets.ClassLabel(names=["small", "large"]) for name in more}
    columns = {"image": [{"bytes": file, "path": None} for file in files], "label": labels, **more}
    table = datasets.Dataset.from_dict(columns, features=datasets.Features(features))
    path.parent.mkdir(parents=True, exist_ok=True)
    table.to_parquet(path)
    return files


def test_parquet_shards_give_the_published_files_and_the_class_names(make, tmp_path):
    repository = tmp_path / "pets"
    files = shard(repository / "data/test-00000-of-00002.parquet", [0, 1])
    files += shard(repository / "data/test-00001-of-00002.parquet", [1], "PNG", first=2)
    dataset = make(f"hub:{repository}", role="ood").dataset
    assert [(row.label, row.split) for row in dataset.rows] == [("cat", "test"), ("dog", "test"), ("dog", "test")]
    assert [dataset.image_path(i).read_bytes() for i in range(3)] == files
    assert [Path(row.path).suffix for row in dataset.rows] == [".jpg", ".jpg", ".png"]
    assert dataset.classes == ("cat", "dog")


@pytest.mark.parametrize("role", ["id", "ood"])
def test_a_split_whose_labels_are_hidden_is_left_out_and_named(make, tmp_path, role):
    shard(tmp_path / "pets/data/train-00000-of-00001.parquet", [0, 1] * 10)
    shard(tmp_path / "pets/data/validation-00000-of-00001.parquet", [0, 1], first=20)
    shard(tmp_path / "pets/data/test-00000-of-00001.parquet", [-1, -1, -1], first=30)
    made = make(f"hub:{tmp_path}/pets", role=role)
    assert {row.image_id for row in made.dataset.subset("test").rows} == {"validation_0000000", "validation_0000001"}
    assert made.left_out == {"rows of split test": 3} | ({"rows of split train": 20} if role == "ood" else {})


def test_a_set_to_train_on_has_all_splits_and_another_its_held_out_one(make, tmp_path):
    repository = tmp_path / "pets"
    shard(repository / "data/train-00000-of-00001.parquet", [0, 1] * 10)
    shard(repository / "data/validation-00000-of-00001.parquet", [0, 1], first=20)
    dataset = make(f"hub:{repository}", role="id").dataset
    assert [len(dataset.subset(split)) for split in ("train", "val", "test")] == [16, 4, 2]  # 0.85 of 10 rounds to 8
    assert {row.image_id.rpartition("_")[0] for row in dataset.subset("test").rows} == {"validation"}
    assert len(make(f"hub:{repository}", "other", role="anomaly").dataset) == 2
    assert len(make(f"hub:{repository}/train", "train", role="anomaly").dataset) == 20
    assert len(make(f"hub:{repository}:default/train", "again", role="anomaly").dataset) == 20


def test_hidden_labels_are_none(make, tmp_path):
    shard(tmp_path / "pets/data/test-00000-of-00001.parquet", [-1, 1])
    assert [row.label for row in make(f"hub:{tmp_path}/pets", role="anomaly").dataset.rows] == ["", "dog"]


def test_an_image_folder_with_metadata_gives_files_and_labels(make, tmp_path):
    folder = tmp_path / "pets/test"
    folder.mkdir(parents=True)
    for i in range(2):
        (folder / f"{i}.png").write_bytes(encoded(i, "PNG"))
    lines = [{"file_name": f"{i}.png", "label": label} for i, label in enumerate(["cat", "dog"])]
    (folder / "metadata.jsonl").write_text("\n".join(json.dumps(line) for line in lines))
    dataset = make(f"hub:{tmp_path}/pets", role="ood").dataset
    assert [row.label for row in dataset.rows] == ["cat", "dog"]
    assert dataset.image_path(1).read_bytes() == encoded(1, "PNG")


def test_of_several_class_labels_one_must_be_named(make, tmp_path):
    repository = tmp_path / "pets"
    shard(repository / "data/test-00000-of-00001.parquet", [0, 1], size=[1, 0])
    with pytest.raises(
        ValueError, match=r"2 columns hold class labels \(label, size\); name the one .*: \?label=<column>"
    ):
        make(f"hub:{repository}", role="ood")
    assert [row.label for row in make(f"hub:{repository}?label=size", role="ood").dataset.rows] == ["large", "small"]
    with pytest.raises(ValueError, match="there is no column 'sise'; there are image, label, size"):
        make(f"hub:{repository}?label=sise", role="ood")


def naming(repository: Path, paths: list[str]) -> str:
    """The source of a copy with one image within its table, and others of which there is a path alone."""
    columns = {
        "image": [{"bytes": encoded(0, "PNG"), "path": None}, *({"bytes": None, "path": path} for path in paths)]
    }
    table = datasets.Dataset.from_dict(columns, features=datasets.Features({"image": datasets.Image()}))
    (repository / "data").mkdir(parents=True, exist_ok=True)
    shards = table.data.table.cast(table.features.arrow_schema)  # `datasets` itself would put the files' bytes in
    pyarrow.parquet.write_table(shards, repository / "data/test-00000-of-00001.parquet")
    return f"hub:{repository}"


def test_a_table_cannot_have_files_of_the_machine_copied_or_wait_for_a_pipe(make, tmp_path):
    (tmp_path / "private.png").write_bytes(encoded(7, "PNG"))
    (tmp_path / "pets").mkdir()
    (tmp_path / "pets/link.png").symlink_to(tmp_path / "private.png")
    (tmp_path / "pets/circle.png").symlink_to(tmp_path / "pets/circle.png")
    os.mkfifo(tmp_path / "pets/pipe.png")
    (tmp_path / "pets/broken.png").write_bytes(b"broken")
    paths = [f"{tmp_path}/private.png", f"{tmp_path}/pets/../private.png", f"{tmp_path}/pets/link.png",
             f"{tmp_path}/pets/pipe.png", f"{tmp_path}/pets/gone.png", f"{tmp_path}/pets/circle.png",
             f"{tmp_path}/pets/broken.png", "https://example.org/a.png", "/etc/passwd", f"{tmp_path}/pets/a\0.png", ""]  # fmt: skip
    made = make(naming(tmp_path / "pets", paths), role="anomaly", max_rejects=0.99)
    assert [row.image_id for row in made.dataset.rows] == ["test_0000000"]
    outside, reasons = "is not one of a file of the source", [one.reason for one in made.rejected]
    expected = [outside] * 3 + ["not a regular file", "No such file", "Symlink loop|symbolic links", "known format"]
    expected += [outside] * 2 + ["cannot be followed .*null", outside]
    assert len(reasons) == len(expected)
    for reason, pattern in zip(reasons, expected, strict=True):
        assert re.search(pattern, reason), (reason, pattern)


def test_files_that_a_table_names_in_its_copy_or_beside_it_in_the_hubs_cache_are_read(make, tmp_path):
    snapshot = tmp_path / "datasets--me--pets/snapshots/abc"
    (snapshot.parents[1] / "blobs").mkdir(parents=True)
    (snapshot / "images").mkdir(parents=True)
    (snapshot.parents[1] / "blobs/0123").write_bytes(encoded(1, "PNG"))
    (snapshot / "images/1.png").symlink_to("../../../blobs/0123")
    (snapshot / "images/2.png").write_bytes(encoded(2, "PNG"))
    dataset = make(naming(snapshot, [f"{snapshot}/images/{i}.png" for i in (1, 2)]), role="anomaly").dataset
    assert [dataset.image_path(i).read_bytes() for i in range(3)] == [encoded(i, "PNG") for i in range(3)]


def test_a_set_without_images_or_with_an_unknown_split_is_refused(make, tmp_path):
    (tmp_path / "texts/data").mkdir(parents=True)
    table = datasets.Dataset.from_dict({"text": ["a"], "label": [1]})
    table.to_parquet(tmp_path / "texts/data/test-00000-of-00001.parquet")
    with pytest.raises(ValueError, match=r"no columns hold images \(text, label\)"):
        make(f"hub:{tmp_path}/texts")
    with pytest.raises(ValueError, match="has no split 'dev'; it has test"):
        make(f"hub:{tmp_path}/texts:default/dev")


def test_a_copy_that_is_missing_and_a_hub_that_cannot_be_reached_are_reported(make, tmp_path):
    with pytest.raises(FileNotFoundError, match=r"gone, the copy that source .* does not exist; clone the repository"):
        make(f"hub:{tmp_path}/gone/gone")
    with pytest.raises(DownloadFailed, match=r"someone/something could not be had from the hub: HF_HUB_OFFLINE is set"):
        make("hub:someone/something@abc123")


@pytest.mark.parametrize(
    ("rest", "parts"),
    [
        ("a/b", ("a/b", "", "", "")),
        ("a/b/test", ("a/b", "", "", "test")),
        ("a/b:full/test", ("a/b", "", "full", "test")),
        ("a/b@1f2e:full", ("a/b", "1f2e", "full", "")),
        ("a/b@refs%2Fconvert%2Fparquet/test", ("a/b", "refs/convert/parquet", "", "test")),
        ("a-1/b.c_d@v1.0/validation?label=fine", ("a-1/b.c_d", "v1.0", "", "validation")),
    ],
)
def test_a_source_is_taken_apart(rest, parts):
    source = HubSource.of(rest)
    assert (source.repository, source.revision, source.config, source.split) == parts


@pytest.mark.parametrize("rest", ["b", "a/b/c/d", "a/b@", "a/b?colour=x", "a b/c"])
def test_a_source_that_cannot_be_read_is_answered_with_the_grammar(rest):
    with pytest.raises(ValueError, match=r"does not read hub:<owner/name>\[@revision\]\[:config\]\[/split\]"):
        HubSource.of(rest)
