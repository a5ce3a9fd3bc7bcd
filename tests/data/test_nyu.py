import numpy as np
import pytest
from PIL import Image

from regvit.data.dense_labels import read_depth
from regvit.data.sources.nyu import depth_name

SCENES = (("train", "kitchen", 20), ("train", "office", 20), ("test", "kitchen", 5))


def make_nyu(root, scenes=SCENES):
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


def test_official_splits_are_kept_a_tenth_of_every_training_scene_is_for_choosing_and_each_has_its_depth(
    make, tmp_path
):
    make_nyu(tmp_path / "nyu")
    made = make(f"nyu:{tmp_path}/nyu")
    dataset = made.dataset
    assert not made.rejected and [len(dataset.subset(split)) for split in ("train", "val", "test")] == [36, 4, 5]
    assert sorted(row.path.split("/")[1] for row in dataset.subset("val").rows) == ["kitchen"] * 2 + ["office"] * 2
    assert all(row.path.startswith("test/") for row in dataset.subset("test").rows)
    for row in dataset.rows:
        number = int(row.path[-9:-4])
        assert read_depth(dataset.root / row.depth)[0, 0] == pytest.approx(1 + number / 1000, abs=1e-6)
    assert depth_name("test/office/rgb_00012.jpg") == "test/office/sync_depth_00012.png"


def test_an_image_without_depth_is_rejected_with_the_reason(make, tmp_path):
    make_nyu(tmp_path / "nyu")
    (tmp_path / "nyu/test/kitchen/sync_depth_00041.png").unlink()
    made = make(f"nyu:{tmp_path}/nyu")
    (rejected,) = made.rejected
    assert rejected.path == "test/kitchen/rgb_00041.jpg" and "sync_depth_00041.png" in rejected.reason
    assert len(made.dataset) == 44


def test_a_folder_of_another_layout_is_refused_with_the_one_expected(make, tmp_path):
    make_nyu(tmp_path / "nyu", SCENES[:1])
    with pytest.raises(FileNotFoundError, match=r"nyu/test holds no <scene>/rgb_<number>\.jpg; expected .*/train and"):
        make(f"nyu:{tmp_path}/nyu")
