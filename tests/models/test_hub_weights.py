"""`timm:` through timm's own client, against a hub on this machine: pinned, verified, resumed, kept, and every refusal."""

import re
import time
from pathlib import Path

import huggingface_hub
import pytest
import timm
import torch
from hub_server import serving
from safetensors.torch import save

from regvit.models.checkpoints import WeightsError
from regvit.models.sources import build

NAMES = iter(f"test_vit.made_{i}" for i in range(99))


@pytest.fixture
def name(monkeypatch) -> str:
    """A model of timm's whose weights no test has had before."""
    name = next(NAMES)
    config = timm.models.get_pretrained_cfg("test_vit")
    known = timm.models._registry._model_pretrained_cfgs
    monkeypatch.setitem(
        known, name, type(config)(**{**vars(config), "hf_hub_id": f"timm/{name}", "tag": name.partition(".")[2]})
    )
    return name


def weights(value: float) -> dict[str, bytes]:
    """A repository's files, with weights that are all alike."""
    state = timm.create_model("test_vit").state_dict()
    return {"model.safetensors": save({key: torch.full_like(held, value) for key, held in state.items()})}


def first(name: str) -> float:
    return float(build(f"timm:{name}").model.cls_token.flatten()[0])


def test_the_newest_weights_or_those_of_a_pinned_commit_are_taken_and_the_commit_is_recorded(hub, name):
    old, new = hub.push(f"timm/{name}", weights(0.25)), hub.push(f"timm/{name}", weights(0.5))
    assert first(name) == 0.5
    built = build(f"timm:{name}@{old}")
    assert float(built.model.cls_token.flatten()[0]) == 0.25
    assert (
        built.about["source"] == f"timm:{name}@{old}"
        and built.about["model_args"] == build(f"timm:{name}").about["model_args"]
    )
    assert build(f"timm:{name}").about["source"] == f"timm:{name}@{new}"


def test_what_was_had_once_is_not_fetched_again_and_is_there_without_the_hub(name, monkeypatch):
    monkeypatch.setattr(time, "sleep", lambda _: None)
    with serving() as hub:
        commit = hub.push(f"timm/{name}", weights(0.5))
        assert [first(name), first(name)] == [0.5, 0.5]
        assert len(hub.downloads()) == 1
    assert first(name) == 0.5 and build(f"timm:{name}@{commit}").about["source"].endswith(commit)


def test_a_transfer_that_broke_off_goes_on_where_it_did(hub, name, monkeypatch):
    monkeypatch.setattr(huggingface_hub.constants, "DOWNLOAD_CHUNK_SIZE", 1000)
    hub.push(f"timm/{name}", weights(0.5))
    hub.busy[f"timm/{name}"] = 2  # asked again
    hub.cut["model.safetensors"] = 5500
    assert first(name) == 0.5
    assert [asked for *_, asked in hub.downloads()] == ["", "bytes=5000-"]


def test_weights_that_are_broken_in_the_cache_are_named(hub, name):
    hub.push(f"timm/{name}", weights(0.5))
    first(name)
    file = Path(huggingface_hub.try_to_load_from_cache(f"timm/{name}", "model.safetensors")).resolve()
    whole = file.read_bytes()
    file.write_bytes(whole[:-4] + b"\0\0\0\0")  # still numbers
    with pytest.raises(WeightsError, match=r"model\.safetensors in the hub's cache is broken: delete it"):
        first(name)
    file.write_bytes(whole[:-400])
    with pytest.raises(WeightsError, match="the pretrained weights cannot be had"):
        first(name)


REFUSED = {
    "missing file": "the repository has no file pytorch_model.bin",
    "missing revision": "it has no such revision: correct it",
    "missing repository": "the hub has no such repository, or a private one: correct the name",
    "401": "its owner gives access on request: accept the terms on its page, then log in",
    "429": "the hub was asked too often from here: wait some minutes, or log in",
    "503": "the hub fails",
    "unreachable": "the hub cannot be reached, or .* check network and proxy",
    "offline": "HF_HUB_OFFLINE is set and the cache does not hold it: unset it",
}


@pytest.mark.parametrize("case", REFUSED)
def test_every_refusal_is_a_sentence_with_its_cure(hub, name, case, monkeypatch):
    source = f"timm:{name}"
    if case != "missing repository":
        hub.push(f"timm/{name}", {"README.md": b""} if case == "missing file" else weights(0.5))
    if case == "missing revision":
        source += "@abc123"
    elif case.isdigit():
        hub.refuse[f"timm/{name}"] = int(case)
    elif case == "unreachable":
        monkeypatch.setattr(
            huggingface_hub.constants,
            "HUGGINGFACE_CO_URL_TEMPLATE",
            "http://127.0.0.1:9/{repo_id}/resolve/{revision}/{filename}",
        )
    elif case == "offline":
        monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(WeightsError) as refused:
        build(source)
    said = str(refused.value)
    assert re.search(REFUSED[case], said) and "or download them by hand and use file:<path>" in said
    assert "\n" not in said
