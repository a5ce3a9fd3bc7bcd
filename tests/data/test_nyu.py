import numpy as np
import pytest
from PIL import Image

from regvit.data.dataset_builder import DatasetBuilder
from regvit.data.dense_labels import read_depth
from regvit.data.manifest import read_dataset, write_dataset
from regvit.data.sources.nyu import depth_name, nyu


def make(root, scenes=(("train", "kitchen", 20), ("train", "office", 20), ("test", "kitchen", 5))):
    """The layout that BTS's script leaves, with images of 12 x 9 pixels; numbers run through, as there."""
    number = 0
    for split, scene, count in scenes:
        folder = root / split / scene
        folder.mkdir(parents=True)
        for _ in range(count):
            Image.new("RGB", (12, 9), (number, 0, 0)).save(folder / f"rgb_{number:05}.jpg")
            depth = np.full((9, 12), 1000 + number, np.uint16)
            Image.fromarray(depth).save(folder / f"sync_depth_{number:05}.png")
            number += 1


def build(folder, root):
    with DatasetBuilder("nyu", folder, folder, folder, 0, quiet=True) as builder:
        nyu(builder, str(root))
    write_dataset(folder, "nyu", builder.rows.rows(), builder.classes, builder.about, builder.root)
    return read_dataset(folder), builder.rejected


def test_official_splits_are_kept_and_a_tenth_of_every_training_scene_is_for_choosing(tmp_path):
    make(tmp_path / "nyu")
    dataset, rejected = build(tmp_path / "set", tmp_path / "nyu")
    assert not rejected and len(dataset) == 45
    assert {split: len(dataset.subset(split)) for split in ("train", "val", "test")} == {
        "train": 36,
        "val": 4,
        "test": 5,
    }
    assert sorted(row.path.split("/")[1] for row in dataset.subset("val").rows) == ["kitchen"] * 2 + ["office"] * 2
    assert all(row.path.startswith("test/") for row in dataset.subset("test").rows)


def test_each_photograph_stands_beside_its_own_depth(tmp_path):
    make(tmp_path / "nyu")
    dataset, _ = build(tmp_path / "set", tmp_path / "nyu")
    for row in dataset.rows:
        number = int(row.path[-9:-4])
        assert read_depth(dataset.root / row.depth)[0, 0] == pytest.approx(1 + number / 1000, abs=1e-6)
    assert depth_name("test/office/rgb_00012.jpg") == "test/office/sync_depth_00012.png"


def test_an_image_without_depth_is_rejected_with_the_reason(tmp_path):
    make(tmp_path / "nyu")
    (tmp_path / "nyu/test/kitchen/sync_depth_00041.png").unlink()
    dataset, rejected = build(tmp_path / "set", tmp_path / "nyu")
    assert [one.path for one in rejected] == ["test/kitchen/rgb_00041.jpg"]
    assert "sync_depth_00041.png" in rejected[0].reason
    assert len(dataset) == 44


def test_a_folder_of_another_layout_is_refused_with_the_one_expected(tmp_path):
    make(tmp_path / "nyu", (("train", "kitchen", 3),))
    with pytest.raises(FileNotFoundError, match=r"nyu/test holds no <scene>/rgb_<number>\.jpg; expected .*/train and"):
        build(tmp_path / "set", tmp_path / "nyu")
