"""SPair-71k and the lists of Oxford's and Paris's buildings in small, as their archives unpack to."""

import json

import numpy as np
import pandas as pd
import pytest
from PIL import Image

from regvit.data.correspondences import read_pairs

PAIRS = ("000001-2007_000027-2007_000032:cat", "000002-2007_000032-2007_000121:cat", "000003-2007_000027-2009_1:dog")


def photograph(path, size=(60, 40), seed=0):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.random.default_rng(seed).integers(0, 255, (*size[::-1], 3), dtype=np.uint8)).save(path)


def make_spair(folder):
    """Three pairs of photographs below `folder`/SPair-71k."""
    root = folder / "SPair-71k"
    for name in PAIRS:
        number, first, second = name.partition(":")[0].split("-")
        category = name.partition(":")[2]
        for image in (first, second):
            photograph(root / f"JPEGImages/{category}/{image}.jpg")
        about = {
            "pair_id": int(number), "filename": name, "category": category, "mirror": 0,
            "src_imname": f"{first}.jpg", "trg_imname": f"{second}.jpg", "src_imsize": [60, 40, 3], "trg_imsize": [60, 40, 3],
            "src_bndbox": [1, 1, 50, 30], "trg_bndbox": [5, 5, 25, 35], "kps_ids": ["0", "3"],
            "src_kps": [[10, 12], [59, 39]], "trg_kps": [[20, 22], [7, 9]],
        }  # fmt: skip
        path = root / f"PairAnnotation/test/{name}.json"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(about))
    (root / "Layout/large").mkdir(parents=True)
    (root / "Layout/large/test.txt").write_text("\n".join(PAIRS) + "\n")
    return root


@pytest.fixture
def spair(tmp_path):
    return make_spair(tmp_path)


def test_spair_is_read_in_place_with_its_keypoints_and_the_published_tolerance(make, tmp_path, spair):
    made = make(f"spair:{spair}")
    names = ["cat_2007_000027", "cat_2007_000032", "cat_2007_000121", "dog_2007_000027", "dog_2009_1"]
    assert list(made.dataset.rows.column("image_id")) == names
    assert set(made.dataset.rows.column("split")) == {"test"} and made.dataset.image_path(0).is_file()
    pairs = read_pairs(tmp_path / "data/mine")
    assert [pair.category for pair in pairs] == ["cat", "cat", "dog"] and pairs[0].tolerance == pytest.approx(3.0)
    assert pairs[0].points.tolist() == [[10.5, 12.5, 20.5, 22.5], [59.5, 39.5, 7.5, 9.5]]


def test_a_pair_of_a_broken_image_is_left_out_and_a_missing_annotation_is_named(make, tmp_path, spair):
    (spair / "JPEGImages/dog/2009_1.jpg").write_bytes(b"broken")
    made = make(f"spair:{spair}", max_rejects=0.5)
    assert len(read_pairs(tmp_path / "data/mine")) == 2 and made.left_out.total() == 1
    (spair / f"PairAnnotation/test/{PAIRS[1]}.json").unlink()
    with pytest.raises(FileNotFoundError, match="unpack the archive again"):
        make(f"spair:{spair}")
    with pytest.raises(FileNotFoundError, match="give the folder SPair-71k"):
        make(f"spair:{tmp_path}")


def make_buildings(root):
    """Four photographs and the lists of one query."""
    for i, name in enumerate(("all_souls_000013", "all_souls_000026", "oxford_002985", "worcester_000194")):
        photograph(root / f"oxbuild_images/{name}.jpg", seed=i)
    lists = {"query": "oxc1_all_souls_000013 10.4 4.1 40.5 30.7", "good": "all_souls_000026\n",
             "ok": "oxford_002985\n", "junk": "worcester_000194\n"}  # fmt: skip
    for ending, text in lists.items():
        path = root / f"gt_files/all_souls_1_{ending}.txt"
        path.parent.mkdir(exist_ok=True)
        path.write_text(text)
    return root


@pytest.fixture
def buildings(tmp_path):
    return make_buildings(tmp_path / "buildings")


def test_buildings_have_cropped_queries_and_lists_of_who_is_sought(make, tmp_path, buildings):
    made = make(f"landmarks:{buildings}", role="anomaly")
    rows = {row.image_id: row for row in made.dataset.rows}
    assert len(rows) == 5 and rows["query_all_souls_1"].split == "val"
    query = Image.open(made.dataset.root / rows["query_all_souls_1"].path)
    whole = Image.open(buildings / "oxbuild_images/all_souls_000013.jpg")
    assert np.array_equal(np.asarray(query), np.asarray(whole)[4:31, 10:40])
    relevant = pd.read_csv(tmp_path / "data/mine/relevant.csv")
    assert relevant["relation"].tolist() == ["positive", "positive", "junk"]
    assert set(relevant["query"]) == {"query_all_souls_1"}
    (buildings / "oxbuild_images/oxford_002985.jpg").unlink()
    with pytest.raises(FileNotFoundError, match=r"names oxford_002985, but there is no"):
        make(f"landmarks:{buildings}", role="anomaly")
