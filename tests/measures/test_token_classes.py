"""The class of an image from one token: from those that carry it and not from the others; and a thousand classes in time."""

import time

import numpy as np
import pytest
import torch
from dense_example import dense_set

from regvit.data.manifest import Row
from regvit.measures.token_classes import class_columns, drawn_tokens, learned_classes, register_cosine
from regvit.probing.splits import Split
from regvit.probing.training import Settings, train_probes

SETTINGS = Settings((0.1, 0.3), steps=100, batch_size=64)
SPLITS = {"train": range(60), "val": range(60, 75), "test": range(75, 105)}


def labelled_set(folder, outlier_share: float = 0.5, registers: int = 1):
    """CLS, the last register and outliers carry the class; all else is noise. Some images have two outliers."""
    rng, count = np.random.default_rng(0), 105
    classes, outliers = np.arange(count) % 3, np.zeros((count, 9), dtype=bool)
    outliers[(np.arange(count) % 10 < 10 * outlier_share)[:, None] & np.isin(np.arange(9), [3, 7])] = True
    signal = np.eye(3, 8)[classes]
    tokens = 0.1 * rng.normal(size=(count, 1 + registers + 9, 8))
    tokens[:, 0] += signal
    tokens[:, registers] += signal
    tokens[:, 1 + registers :] += outliers[..., None] * signal[:, None]
    arrays = {"cls": tokens[:, 0], "registers": tokens[:, 1 : 1 + registers], "patches": tokens[:, 1 + registers :]}
    split = {i: name for name, rows in SPLITS.items() for i in rows}
    rows = [Row(f"{i}", f"{i}.png", "abc"[classes[i]], split[i]) for i in range(count)]
    return dense_set(folder, arrays | {"outliers": outliers}, rows, side=3)


def columns_of(dense) -> dict[str, np.ndarray]:
    train, val = (drawn_tokens(dense, dense.rows(split)) for split in ("train", "val"))
    probes = learned_classes(train, val, dense.dataset.classes, SETTINGS)
    return {
        name.removeprefix("class_top1_"): of for name, of in class_columns(dense, dense.rows("test"), probes).items()
    }


def test_a_class_is_read_from_the_tokens_that_carry_it_and_not_from_the_others(tmp_path):
    found = columns_of(labelled_set(tmp_path / "set", registers=2))
    kinds = {"cls", "register", "register_0", "register_1", "normal", "normal_beside", "outlier"}
    assert found.keys() == {*kinds, "difference", "register_cosine"}
    assert found["cls"].mean() == found["register_1"].mean() == 1 and abs(found["register_0"].mean() - 1 / 3) < 0.25
    assert 0.5 < found["register"].mean() < 1  # one of the two knows
    assert np.nanmean(found["outlier"]) == 1 and np.isnan(found["outlier"]).sum() == 15
    assert abs(found["normal"].mean() - 1 / 3) < 0.15
    assert np.array_equal(np.isnan(found["normal_beside"]), np.isnan(found["outlier"]))
    assert np.nanmean(found["difference"]) > 0.5


def test_a_kind_of_token_that_is_nowhere_has_no_value(tmp_path):
    found = columns_of(labelled_set(tmp_path / "set", 0.0))
    assert np.isnan(found["outlier"]).all() and not np.isnan(found["normal"]).any()
    assert "register_0" not in found and found["register"].mean() == 1  # a single one has no name of its own


def test_one_token_of_each_image_is_drawn_among_those_of_the_kind(tmp_path):
    dense = labelled_set(tmp_path / "set")
    rows = dense.rows("train")
    drawn, patches, outliers = drawn_tokens(dense, rows, 1), dense.read("patches", rows), dense.outliers(rows)
    assert len(drawn["outlier"].labels) == outliers.any(1).sum() == 30 and len(drawn["normal"].labels) == 60
    for image, token in zip(np.flatnonzero(outliers.any(1)), drawn["outlier"].features["outlier"], strict=True):
        assert any(np.array_equal(token, each) for each in patches[image][outliers[image]])
    again = drawn_tokens(dense, rows, 1)["normal"].features["normal"]
    assert np.array_equal(again, drawn["normal"].features["normal"])
    assert not np.array_equal(again, drawn_tokens(dense, rows, 2)["normal"].features["normal"])


def test_the_similarity_of_registers_is_the_mean_cosine_of_all_pairs():
    registers = torch.randn(4, 3, 5, generator=torch.Generator().manual_seed(0))
    unit = torch.nn.functional.normalize(registers, dim=-1)
    pairs = torch.stack([(unit[:, i] * unit[:, j]).sum(-1) for i, j in ((0, 1), (0, 2), (1, 2))]).mean(0)
    assert register_cosine(registers).tolist() == pytest.approx(pairs.tolist(), abs=1e-6)


def test_a_thousand_classes_are_learned_from_five_images_each_in_time():
    rng = np.random.default_rng(0)
    centres = rng.normal(size=(1000, 128)).astype(np.float32)

    def images(each: int) -> Split:
        labels = np.repeat(np.arange(1000), each)
        return Split({"cls": centres[labels] + rng.normal(size=(len(labels), 128)).astype(np.float32)}, labels)

    start = time.process_time()
    probes = train_probes(images(5), images(1), [str(i) for i in range(1000)], Settings((0.03, 0.1, 0.3), 120, 256))
    assert probes.probes["cls"][0].val_correct > 900
    assert time.process_time() - start < 60
