import pytest

from regvit.report.references import references

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


def test_another_reference_can_be_chosen():
    runs = {"intact": run_of("plain"), "trained": run_of("hub", "trained")}
    assert references(runs, BACKBONES, {"trained": "intact"}) == {"trained": "intact"}
    with pytest.raises(ValueError, match=r"compare\.references names the run 'nobody'; there are intact, trained"):
        references(runs, BACKBONES, {"trained": "nobody"})
    with pytest.raises(ValueError, match=r"compare\.references holds the run 'intact' against itself"):
        references(runs, BACKBONES, {"intact": "intact"})
