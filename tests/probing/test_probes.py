import json

import numpy as np
import pytest
from safetensors.numpy import save_file

from regvit.probing.probes import (
    Baselines,
    InvalidProbes,
    Neighbours,
    Probe,
    ProbeSet,
    load_baselines,
    load_probes,
    save_baselines,
    save_probes,
)


def made(readout, seed, pool=None):
    rng = np.random.default_rng([seed, len(readout)])
    weight, bias = rng.normal(size=(2, 6)).astype(np.float32), rng.normal(size=2).astype(np.float32)
    return Probe(readout, weight, bias, 3, 0.1, seed, pool=pool, n_registers=0 if pool is None else 3)


@pytest.mark.parametrize("name", ["cls_reg_learned", "cls_reg_attn"])
def test_a_probe_that_pools_embeds_by_its_formula(name):
    rng = np.random.default_rng(0)
    tokens = rng.normal(size=(5, 4, 3)).astype(np.float32)  # CLS and three registers of three channels
    pool = rng.normal(size=3).astype(np.float32)
    probe = made(name, 0, pool)
    for image, found in zip(tokens, probe.embed(tokens.reshape(5, 12)), strict=True):
        scores = pool if name == "cls_reg_learned" else [register @ pool / 3**0.5 for register in image[1:]]
        shares = np.exp(scores) / np.exp(scores).sum()
        np.testing.assert_allclose(found, np.r_[image[0], shares @ image[1:]], rtol=1e-5)
    with pytest.raises(ValueError, match=rf"features of shape \(5, 9\) do not fit .*'{name}', which takes \(b, 12\)"):
        probe.logits(tokens[:, 1:].reshape(5, 9))


def test_saved_probes_and_baselines_come_back_as_they_were(tmp_path):
    pool = np.ones(3, np.float32)
    probes = ProbeSet(
        {"cls_reg": (made("cls_reg", 4), made("cls_reg", 9)), "cls_reg_attn": (made("cls_reg_attn", 4, pool),) * 2},
        ("ant", "çat"), {"steps": 30, "seeds": [4, 9]}, 20, 10,
    )  # fmt: skip
    logistic = Probe("cls", np.ones((2, 6), np.float32), np.zeros(2, np.float32), 3, C=0.1)
    baselines = Baselines({"cls": logistic}, {"cls": Neighbours(20, 0.07, 9)}, ("ant", "çat"), 20, 10)
    for name in ("one", "two"):
        save_probes(tmp_path / name, probes)
        save_baselines(tmp_path / f"b{name}", baselines)
    assert (tmp_path / "one").read_bytes() == (tmp_path / "two").read_bytes()
    assert (tmp_path / "bone").read_bytes() == (tmp_path / "btwo").read_bytes()
    loaded, others = load_probes(tmp_path / "one"), load_baselines(tmp_path / "bone")
    assert list(loaded.probes) == list(probes.probes) and others.knn == baselines.knn
    for key in ("classes", "settings", "train_images", "val_images"):
        assert getattr(loaded, key) == getattr(probes, key)
    pairs = [(others.logistic["cls"], logistic)]
    pairs += [pair for name in ("cls_reg",) for pair in zip(loaded.probes[name], probes.probes[name], strict=True)]
    for one, other in pairs:
        assert all(np.array_equal(getattr(one, key), getattr(other, key)) for key in vars(other))
    assert np.array_equal(loaded.probes["cls_reg_attn"][0].pool, pool)


@pytest.mark.parametrize(
    ("metadata", "said"),
    [
        (None, "holds something else of format None; expected a file of probes of format 3"),
        ({"kind": "probes", "format_version": 9}, "holds probes of format 9; expected .* of format 3; run the probe stage again"),
        ({"kind": "baselines", "format_version": 3}, "holds baselines of format 3; expected a file of probes"),
    ],
)  # fmt: skip
def test_files_that_hold_no_probes_are_refused(tmp_path, metadata, said):
    with pytest.raises(FileNotFoundError, match="run the probe stage"):
        load_probes(tmp_path / "made")
    (tmp_path / "made").write_text("hello")
    with pytest.raises(InvalidProbes, match="is no safetensors file"):
        load_probes(tmp_path / "made")
    save_file({"w": np.zeros(2)}, tmp_path / "made", metadata=metadata and {"regvit": json.dumps(metadata)})
    with pytest.raises(InvalidProbes, match=said):
        load_probes(tmp_path / "made")
