"""Every choice makes params.yaml a whole experiment, and every backbone on the list is one that timm has weights of."""

import re
import sys
from pathlib import Path

import pytest
import timm
from ruamel.yaml import YAML
from timm.data import ImageNetInfo

from regvit.data.entry import ClassChoice
from regvit.data.sources import find_source
from regvit.pipeline import choose
from regvit.pipeline.params import faults_of
from regvit.registers.neurons import PUBLISHED, SearchOptions

ROOT = Path(__file__).parents[2]
CHOICES = [file.stem for file in sorted((ROOT / "choices").glob("*.yaml")) if file.stem not in choose.LISTS]
PARAMS = (ROOT / "params.yaml").read_text()
PRETRAINED = set(timm.list_pretrained())


def load(text: str) -> dict:
    return YAML(typ="safe", pure=True).load(text)


READY = load((ROOT / "choices/backbones.yaml").read_text())
BACKBONES = READY["backbones"]
PUBLISHED_BACKBONES = {  # our entries by the names of the published settings
    "openai_clip_base": "clip_base_openai",
    "openclip_base": "clip_base_laion",
    "openclip_large": "clip_large_laion",
    "dinov2_large": "dinov2_large",
}


@pytest.fixture(autouse=True)
def in_root(monkeypatch):
    monkeypatch.chdir(ROOT)


@pytest.fixture(scope="module")
def pictures(tmp_path_factory) -> str:
    """A folder that holds all that a choice names in `{images}`."""
    folder = tmp_path_factory.mktemp("pictures")
    for name in CHOICES:
        for path in re.findall(r"\{images\}/([^\s\"':]+)", (ROOT / f"choices/{name}.yaml").read_text()):
            (folder / path).mkdir(parents=True, exist_ok=True)
    return str(folder)


@pytest.fixture(scope="module")
def imagenet_chosen(pictures, tmp_path_factory) -> str:
    """params.yaml after another choice."""
    file = tmp_path_factory.mktemp("chosen") / "params.yaml"
    file.write_text(PARAMS)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(ROOT)
        patch.setattr(sys, "argv", ["choose", "imagenet", "--images", pictures, "--params", str(file)])
        choose.main()
    return file.read_text()


@pytest.fixture
def pick(tmp_path, monkeypatch, capsys):
    """Picks a choice on a copy of params.yaml; returns what is said."""
    file = tmp_path / "params.yaml"
    file.write_text(PARAMS)

    def pick(*arguments: str) -> str:
        monkeypatch.setattr(sys, "argv", ["choose", *arguments, "--params", str(file)])
        choose.main()
        return capsys.readouterr().out

    pick.file = file
    return pick


def test_the_published_searches_are_ready_to_be_copied():
    assert set(READY["identify"]) == set(PUBLISHED_BACKBONES.values()) and set(PUBLISHED_BACKBONES) == set(PUBLISHED)
    for name, options in PUBLISHED.items():
        entry = READY["identify"][PUBLISHED_BACKBONES[name]]
        assert SearchOptions(**{key: value for key, value in entry.items() if key != "images"}) == options
        assert not faults_of(load(PARAMS) | {"identify": load(PARAMS)["identify"] | entry})


@pytest.mark.parametrize("name", CHOICES)
def test_a_choice_gives_parameters_without_fault_whatever_was_chosen_before_and_emoji_leads_back(
    pick, pictures, imagenet_chosen, name
):
    pick(name, "--images", pictures)  # which refuses to leave faults
    alone = pick.file.read_text()
    pick.file.write_text(imagenet_chosen)
    pick(name, "--images", pictures)
    assert pick.file.read_text() == alone
    pick("emoji")
    assert pick.file.read_text() == PARAMS


@pytest.mark.parametrize("name", CHOICES)
def test_the_sources_backbones_and_files_of_classes_of_a_choice_are_known(name):
    chosen = load(choose.read_choice(name, "/pictures"))
    for entry in chosen.get("datasets", {}).values():
        find_source(entry["source"])
        if "classes" in entry:
            assert ClassChoice.of(entry["classes"]).classes
    for entry in chosen.get("backbones", {}).values():
        kind, _, model = entry["source"].partition(":")
        assert kind == "package" or model in PRETRAINED


def test_the_default_choice_changes_nothing_in_the_parameters_of_this_repository(pick):
    assert pick("emoji") == f"{pick.file}: emoji, as it was\n"
    assert pick.file.read_text() == PARAMS


def test_a_choice_keeps_the_comments_and_the_settings_that_no_choice_names(pick, pictures):
    own = PARAMS.replace("explained: 0.99 # share", "explained: 0.9 # mine, share")
    assert own != PARAMS
    pick.file.write_text(own)
    pick("imagenet", "--images", pictures)
    text = pick.file.read_text()
    assert "explained: 0.9 # mine, share of the outliers' excess" in text
    assert text.startswith(PARAMS[: PARAMS.index("in_distribution")])
    assert "# 200 of the classes: accuracy is among these" in text  # the comments of the choice come along
    assert "\n\nbackbones:" in text  # and the blocks stay apart


def test_what_changed_is_shown_by_dvc(pick, pictures):
    assert "`dvc params diff` shows what changed" in pick("imagenet", "--images", pictures)
    assert f'source: "folder:{pictures}/imagenet-a"' in pick.file.read_text()


def test_a_choice_that_reads_images_asks_for_their_folder_and_names_the_files_that_are_missing(pick, tmp_path):
    with pytest.raises(
        choose.BadChoice, match=r"say --images FOLDER .*, which holds imagenet, imagenet-a, imagenet-r, sketch"
    ):
        pick("imagenet")
    (tmp_path / "imagenet").mkdir()
    with pytest.raises(choose.BadChoice, match=r"datasets\.imagenet_a\.source: .*/imagenet-a does not exist") as caught:
        pick("imagenet", "--images", str(tmp_path))
    assert "datasets.imagenet.source" not in str(caught.value) and pick.file.read_text() == PARAMS
    with pytest.raises(choose.BadChoice, match="has a quote or a backslash"):
        pick("imagenet", "--images", 'a"b')


def test_an_unknown_choice_is_answered_with_those_that_there_are(pick):
    with pytest.raises(
        choose.BadChoice,
        match="no choice 'imagnet'; there are anatomy, cifar10, clip, cures, dense, emoji, emoji_large, finetune, imagenet, mine, openood, registers",
    ):
        pick("imagnet")


def test_the_choices_are_listed_with_what_they_are_and_the_list_of_backbones_is_none(pick):
    lines = pick("--list").splitlines()
    assert [line.split()[0] for line in lines] == CHOICES
    assert all(len(line.split()) > 5 for line in lines) and "backbones" not in CHOICES


@pytest.mark.parametrize(
    ("overlay", "said"),
    [
        ("nonsense: 1\n", "has no 'nonsense'"),
        ("probe:\n  stepps: 1\n", "has no probe.stepps"),
        ("in_distribution: nothing\n", r"would leave .* with faults:\n  - in_distribution is 'nothing'"),
    ],
)
def test_a_choice_can_only_change_what_is_there_and_leaves_no_fault(pick, monkeypatch, overlay, said):
    monkeypatch.setattr(choose, "read_choice", lambda name, images: overlay)
    with pytest.raises(choose.BadChoice, match=said):
        pick("emoji")
    assert pick.file.read_text() == PARAMS


def test_the_choice_of_dense_sets_measures_each_of_them_under_all_kinds_of_registers(pick, pictures):
    pick("dense", "--images", pictures)
    chosen = load(pick.file.read_text())
    measured = {name for stage in ("discover", "segment", "depth", "correspond") for name in chosen[stage]["datasets"]}
    assert measured == set(chosen["scenes"])
    assert [run["registers"] for run in chosen["runs"].values()][:3] == ["none", "test_time", "trained"]
    assert (chosen["depth"]["crop"], chosen["depth"]["max_depth"]) == ("eigen", 10.0)


# The list of backbones, and the files of classes.


def test_every_backbone_on_the_list_is_one_that_timm_has_weights_of_and_has_the_form_of_an_entry():
    for name, entry in BACKBONES.items():
        kind, _, model = entry["source"].partition(":")
        known = model in PRETRAINED if kind == "timm" else timm.is_model(entry["architecture"])
        assert known, f"timm has no {model} for {name}"
    faults = faults_of(load(PARAMS) | {"backbones": BACKBONES})
    assert not [fault for fault in faults if fault.startswith("backbones.") or "unknown key" in fault]


def test_imagenet_v2_folders_are_the_wnids_of_imagenet_1k_in_sorted_order():
    choice = ClassChoice.of("choices/classes/imagenet_v2.csv")
    wnids = ImageNetInfo("imagenet-1k").label_names()
    assert list(choice.new_names) == [str(i) for i in range(1000)]
    assert choice.classes == tuple(wnids) == tuple(sorted(wnids))
