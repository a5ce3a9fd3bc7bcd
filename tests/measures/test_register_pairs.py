"""Registers pair by pair: figures are worked by hand."""

import numpy as np
import pytest
from dense_example import dense_set

from regvit.measures.attention_quality import head_maps
from regvit.measures.register_pairs import register_pairs

THREE = {"cls": 1, "trained": 3, "test_time": 0}


def made(folder, **arrays):
    """Two images in two blocks of two heads; registers 0 and 1 look at one patch of their own each, but in the last head of
    the last block at the same one; register 2 at all alike."""
    attention = np.zeros((2, 2, 2, 4, 4 + 16))  # (b, l, h, q, n)
    attention[..., 0] = 0.5  # on CLS
    for register in (0, 1):
        attention[..., 1 + register, 4 + register] = 0.5
    attention[:, 1, 1, 2] = attention[:, 1, 1, 1]
    attention[..., 3, 4:] = 0.5 / 16
    attention[..., 0, 4:] = np.arange(16) / 240
    attention[:, 1, 1, 0, 4:] = np.arange(16)[::-1] / 240
    return dense_set(folder, {"attention": attention.astype(np.float16), **arrays}, layout=THREE)


def test_a_table_has_a_row_a_pair_with_means_over_the_chosen_blocks_and_heads_and_over_images(tmp_path):
    registers = np.zeros((2, 3, 2), dtype=np.float32)
    registers[:, 0] = registers[:, 1] = (1, 0)
    registers[0, 2], registers[1, 2] = (0, 1), (1, 0)
    dense = made(tmp_path, registers=registers)
    table = register_pairs(dense, [0, 1], layers=[0, 1]).set_index(["register", "other"])
    assert list(table.index) == [(0, 1), (0, 2), (1, 2)]
    assert table["overlap"].tolist() == pytest.approx([1 / 4, 1 / 16, 1 / 16], abs=1e-3)
    assert table["cosine"].tolist() == pytest.approx([1, 0.5, 0.5])
    assert table.loc[(0, 2), "cosine_lo"] < 0.5 < table.loc[(0, 2), "cosine_hi"]
    assert register_pairs(dense, [0, 1], [1], heads=[1])["overlap"][0] == pytest.approx(1, abs=1e-3)


def test_where_tokens_were_not_kept_there_is_no_cosine(tmp_path):
    table = register_pairs(made(tmp_path), [0, 1], layers=[1])
    assert len(table) == 3 and table["cosine"].isna().all() and not table["overlap"].isna().any()


def test_a_single_register_has_no_pair(tmp_path):
    dense = dense_set(tmp_path, {"attention": np.ones((1, 1, 1, 2, 18), dtype=np.float16) / 18})
    assert register_pairs(dense, [0], [0]).empty


def test_maps_by_head_are_those_of_the_last_block(tmp_path):
    maps = head_maps(made(tmp_path), [0])
    assert list(maps) == ["cls", "register_0", "register_1", "register_2"]
    assert maps["cls"].shape == (1, 2, 4, 4)
    assert maps["cls"][0, 0, 3, 3] == pytest.approx(15 / 240, abs=1e-4) and maps["cls"][0, 1, 3, 3] == 0
    assert np.array_equal(maps["register_0"][0, 1], maps["register_1"][0, 1])
