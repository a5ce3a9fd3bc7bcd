"""Every choice makes params.yaml a whole experiment, and every backbone on the list is one that timm has weights of."""

import sys
from pathlib import Path

import pytest
import timm
from ruamel.yaml import YAML
from timm.data import ImageNetInfo

ROOT = Path(__file__).parent.parent.parent
sys.path.insert(0, str(ROOT / "stages"))

from regvit.data.class_choice import ClassChoice  # noqa: E402
from regvit.data.sources import find_source  # noqa: E402
from regvit.pipeline import choose  # noqa: E402
from regvit.pipeline.params import SCHEMA, faults_of  # noqa: E402

CHOICES = [file.stem for file in sorted((ROOT / "choices").glob("*.yaml")) if file.stem not in choose.LISTS]
PARAMS = (ROOT / "params.yaml").read_text()


def load(text: str) -> dict:
    return YAML(typ="safe", pure=True).load(text)


@pytest.fixture(autouse=True)
def in_root(monkeypatch):
    monkeypatch.chdir(ROOT)


@pytest.fixture
def pick(tmp_path, monkeypatch, capsys):
    """Run `choose.py` on a copy of params.yaml; returns what it says."""
    (tmp_path / "params.yaml").write_text(PARAMS)

    def pick(*arguments: str) -> str:
        monkeypatch.setattr(sys, "argv", ["choose.py", *arguments, "--params", str(tmp_path / "params.yaml")])
        choose.main()
        return capsys.readouterr().out

    pick.file = tmp_path / "params.yaml"
    return pick


@pytest.mark.parametrize("name", CHOICES)
def test_a_choice_gives_parameters_without_fault(pick, name):
    pick(name, "--images", "/pictures")
    assert list(faults_of(load(pick.file.read_text()))) == []


@pytest.mark.parametrize("name", CHOICES)
def test_the_sources_of_a_choice_are_known_and_its_files_of_classes_can_be_read(name):
    for entry in load(choose.read_choice(name, "/pictures")).get("datasets", {}).values():
        find_source(entry["source"])
        if "classes" in entry:
            assert ClassChoice.of(entry["classes"]).classes


@pytest.mark.parametrize("name", CHOICES)
def test_backbones_of_a_choice_are_timms_or_fetched_as_packages(name):
    pretrained = set(timm.list_pretrained())
    for entry in load(choose.read_choice(name, "/pictures")).get("backbones", {}).values():
        kind, _, model = entry["source"].partition(":")
        assert kind == "package" or model in pretrained


def test_the_default_choice_changes_nothing_in_the_parameters_of_this_repository(pick):
    assert pick("emoji") == f"{pick.file}: emoji\n  nothing changes\n"
    assert pick.file.read_text() == PARAMS


@pytest.mark.parametrize("name", CHOICES)
def test_a_choice_does_not_depend_on_the_one_before_it_and_emoji_leads_back(pick, name):
    pick(name, "--images", "/pictures")
    alone = load(pick.file.read_text())
    pick("imagenet", "--images", "/elsewhere")
    pick(name, "--images", "/pictures")
    assert load(pick.file.read_text()) == alone
    pick("emoji")
    assert load(pick.file.read_text()) == load(PARAMS)


def test_a_choice_keeps_the_comments_and_the_settings_that_no_choice_names(pick):
    own = PARAMS.replace("images: 512 # of", "images: 99 # mine, of")
    assert own != PARAMS
    pick.file.write_text(own)
    pick("imagenet", "--images", "/pictures")
    text = pick.file.read_text()
    assert "images: 99 # mine, of the ID train split" in text
    assert text.startswith(PARAMS[: PARAMS.index("in_distribution")])
    assert "# 200 of the classes: accuracy is among these" in text  # the comments of the choice come along
    assert "\n\nbackbones:" in text  # and the blocks stay apart


def test_what_changed_is_said(pick):
    said = pick("imagenet", "--images", "/pictures")
    assert "  in_distribution: twemoji -> imagenet\n" in said
    assert "  probe.steps: 1000 -> 10000\n" in said
    assert "  runs: intact, original, test_time_reg -> large, base, giant\n" in said
    assert 'source: "folder:/pictures/imagenet-a"' in pick.file.read_text()


def test_a_choice_that_reads_images_asks_for_their_folder_and_says_what_it_must_hold(pick):
    with pytest.raises(choose.BadChoice, match=r"say --images FOLDER .* that holds .*imagenet-a, imagenet-r, sketch"):
        pick("imagenet")
    assert pick.file.read_text() == PARAMS


def test_an_unknown_choice_is_answered_with_those_that_there_are(pick):
    with pytest.raises(
        choose.BadChoice, match="there is no choice 'imagnet'; there are cifar10, dense, emoji, imagenet"
    ):
        pick("imagnet")


def test_the_choices_are_listed_with_what_they_are_and_the_list_of_backbones_is_none(pick):
    lines = pick("--list").splitlines()
    assert [line.split()[0] for line in lines] == CHOICES
    assert all(len(line.split()) > 5 for line in lines) and "backbones" not in CHOICES


def test_a_choice_that_would_leave_a_fault_is_refused(pick, monkeypatch):
    monkeypatch.setattr(choose, "read_choice", lambda name, images: "in_distribution: nothing\n")
    with pytest.raises(choose.BadChoice, match=r"would leave .* with faults:\n  - in_distribution is 'nothing'"):
        pick("emoji")
    assert pick.file.read_text() == PARAMS


@pytest.mark.parametrize(
    ("overlay", "said"),
    [
        ("nonsense: 1\n", "has no 'nonsense'"),
        ("probe:\n  stepps: 1\n", "has no probe.stepps"),
        ("probe: {steps: 1}\n", "share"),
    ],
)
def test_a_choice_can_only_change_what_is_there(overlay, said):
    with pytest.raises(choose.BadChoice, match=said):
        choose.merge(PARAMS, overlay)


def test_sections_end_where_the_comment_of_the_next_begins():
    text = "a: 1 # one\n\n# about b\nb: # two\n  # about c\n  c: 3\n\n  # about d\n  d:\n    - 1\n\ne: {f: 2}\n"
    assert choose.sections(text) == {
        "a": "a: 1 # one\n",
        "b": "b: # two\n  # about c\n  c: 3\n\n  # about d\n  d:\n    - 1\n",
        "e": "e: {f: 2}\n",
    }
    assert choose.sections(choose.sections(text)["b"], "b") == {"c": "  c: 3\n", "d": "  d:\n    - 1\n"}


def test_the_choice_of_dense_sets_measures_each_of_them_under_all_kinds_of_registers(pick):
    pick("dense", "--images", "/pictures")
    found = load(pick.file.read_text())
    measured = {name for stage in ("discover", "segment", "depth") for name in found[stage]["datasets"]}
    assert measured == set(found["scenes"])
    assert [run["registers"] for run in found["runs"].values()] == ["none", "test_time", "trained"]
    assert (found["depth"]["crop"], found["depth"]["max_depth"]) == ("eigen", 10.0)


# The list of backbones, and the files of classes.


def test_every_backbone_on_the_list_is_one_that_timm_has_weights_of():
    listed = load((ROOT / "choices/backbones.yaml").read_text())["backbones"]
    pretrained = set(timm.list_pretrained())
    for name, entry in listed.items():
        kind, _, model = entry["source"].partition(":")
        known = model in pretrained if kind == "timm" else timm.is_model(entry["architecture"])
        assert known, f"timm has no {model} for {name}"


def test_every_backbone_on_the_list_has_the_form_of_an_entry():
    params = load(PARAMS) | load((ROOT / "choices/backbones.yaml").read_text())
    assert [fault for fault in SCHEMA(params, "") if fault.startswith("backbones") or "backbones." in fault] == []


def test_image_sizes_on_the_list_are_multiples_of_the_patch_size():
    for entry in load((ROOT / "choices/backbones.yaml").read_text())["backbones"].values():
        if "img_size" in entry:
            assert entry["img_size"] % 14 == 0 and "patch14" in entry.get("architecture", entry["source"])


def test_imagenet_v2_folders_are_the_wnids_of_imagenet_1k_in_sorted_order():
    choice = ClassChoice.of("choices/classes/imagenet_v2.csv")
    wnids = ImageNetInfo("imagenet-1k").label_names()
    assert list(choice.new_names) == [str(i) for i in range(1000)]
    assert choice.classes == tuple(wnids) == tuple(sorted(wnids))
