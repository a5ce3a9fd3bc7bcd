import pytest

from regvit.report.study import references

BACKBONES = {"plain": {"source": "a"}, "planted": {"source": "a", "plant": {"cls_share": 0.2}}, "hub": {"source": "b"}}


def run_of(backbone: str, registers: str = "none", **more) -> dict:
    return {"backbone": backbone, "registers": registers, "num_registers": 0, **more}


def test_a_run_is_held_against_the_same_backbone_without_registers_and_a_planted_one_against_the_unplanted():
    runs = {
        "cured": run_of("planted", "test_time"),
        "intact": run_of("plain"),
        "silenced": run_of("planted", neurons="ablated"),
        "original": run_of("planted"),
        "trained": run_of("hub", "trained"),
        "random": run_of("planted", "test_time", neurons="random"),
    }
    assert references(runs, BACKBONES) == {
        "cured": "original", "silenced": "original", "original": "intact", "random": "original",
    }  # fmt: skip


def test_a_backbone_that_was_trained_here_is_held_against_the_one_that_came_with_registers_or_without():
    backbones = BACKBONES | {
        "tuned": {"source": "a", "train": {"registers": 0}},
        "tuned_reg": {"source": "a", "plant": None, "train": {"registers": 4}},
        "other": {"source": "c", "train": {"registers": 4}},
    }
    runs = {
        "intact": run_of("plain"),
        "tuned": run_of("tuned"),
        "tuned_reg": run_of("tuned_reg", "trained"),
        "cured": run_of("tuned", "test_time"),
        "alone": run_of("other", "trained"),
    }
    assert references(runs, backbones) == {"tuned": "intact", "tuned_reg": "intact", "cured": "tuned"}


def test_another_reference_can_be_chosen():
    runs = {"intact": run_of("plain"), "trained": run_of("hub", "trained")}
    assert references(runs, BACKBONES, {"trained": "intact"}) == {"trained": "intact"}
    with pytest.raises(ValueError, match=r"compare\.references names the run 'nobody'; there are intact, trained"):
        references(runs, BACKBONES, {"trained": "nobody"})
    with pytest.raises(ValueError, match=r"compare\.references holds the run 'intact' against itself"):
        references(runs, BACKBONES, {"intact": "intact"})


def test_a_cured_run_is_held_against_the_run_that_is_the_same_but_for_the_cure():
    runs = {
        "original": {"backbone": "planted", "registers": "none", "num_registers": 0},
        "reg": {"backbone": "planted", "registers": "test_time", "num_registers": 1, "cure": None},
        "masked": {"backbone": "planted", "registers": "none", "num_registers": 0, "cure": "mask_attention"},
        "mean": {"backbone": "planted", "registers": "test_time", "num_registers": 1, "cure": {"name": "x"}},
        "alone": {"backbone": "planted", "registers": "test_time", "num_registers": 2, "cure": "x"},
    }
    found = references(runs, {"planted": {"plant": {}}})
    assert found == {"reg": "original", "masked": "original", "mean": "reg"}
