"""The command line, run as `main([...])` in a folder that looks like the repository after its pipeline."""

import csv
import io
import json
import os
import shutil
import subprocess
import sys
import time
from importlib import metadata
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
from PIL import Image
from run_example import write_run
from white_patches import LAYER, UNIT, picture, plant_one

import regvit.cli.options
import regvit.cli.outputs
import regvit.models.backbones
import regvit.registers.test_time
import regvit.report.look
from regvit.cli import main
from regvit.data.transform import Transform
from regvit.models.backbones import create, load_backbone, save_backbone
from regvit.registers.export import load
from regvit.registers.run_files import Variant

ARCHITECTURE = "vit_tiny_patch16_224"
ARGS = {"img_size": 64, "patch_size": 8, "depth": 6, "embed_dim": 64, "num_heads": 4, "num_classes": 0}
TRANSFORM = Transform(64, (0.5, 0.5, 0.5), (0.5, 0.5, 0.5))


@pytest.fixture(scope="module")
def project(tmp_path_factory):
    """data/backbones/{tiny,quiet}, photos/ and the neurons of tiny, as the pipeline leaves them."""
    root = tmp_path_factory.mktemp("project")
    (root / "photos" / "deep").mkdir(parents=True)
    for i in range(12):
        Image.fromarray(picture(i)).save(root / "photos" / ("deep" if i % 2 else "") / f"{i:02}.png")
    Image.new("RGB", (64, 64), (90, 120, 60)).save(root / "grey.png")
    torch.manual_seed(0)
    with torch.no_grad():
        for name in ("quiet", "tiny"):
            model = create(ARCHITECTURE, {**ARGS, "dynamic_img_size": True})
            if name == "tiny":
                files = sorted((root / "photos").rglob("*.png"))
                plant_one(model, TRANSFORM.normalise(torch.stack([TRANSFORM.load(file) for file in files])))
            about = {"architecture": ARCHITECTURE, "model_args": {**ARGS, "dynamic_img_size": True}}
            about |= {"transform": TRANSFORM, "source": "made here", "licence": "MIT"}
            save_backbone(root / "data" / "backbones" / name, model, name=name, **about)
    (root / "features" / "neurons").mkdir(parents=True)
    patches = ["--img-size", "64", "--limit", "12"]
    assert main(["neurons", str(root / "data/backbones/tiny"), str(root / "photos"), *patches,
                 "--out", str(root / "features/neurons/tiny.json")]) == 0  # fmt: skip
    return root


@pytest.fixture
def here(project, monkeypatch, tmp_path):
    """The project as working directory; what a test writes goes into `tmp_path`."""
    monkeypatch.chdir(project)
    return tmp_path


def test_neurons_finds_the_planted_neuron_and_prints_what_it_does(here, capsys):
    out = here / "n" / "neurons.json"
    assert main(["neurons", "tiny", "photos", "--img-size", "64", "--out", str(out)]) == 0
    lines = capsys.readouterr().out.splitlines()
    found = json.loads(out.read_text())
    assert found["selected"] == {str(LAYER): [UNIT]}
    assert found["weights_sha256"] == load_backbone("data/backbones/tiny").weights_sha256
    assert (found["backbone"], found["images"], found["seed"]) == ("tiny", 12, 0)
    assert lines[0].startswith("1.56% of the patches of 12 images are outliers (norm over ")  # one of 64
    assert lines[1].startswith("1 register neuron writes ")
    assert lines[3].split()[:2] == [str(LAYER), str(UNIT)]
    assert lines[4] == "outlier patches: 1.56% as it is, 0.00% with the neurons silenced, 0.00% with one register"
    assert lines[5] == str(out)


def test_neurons_are_held_against_those_of_another_file(here, capsys):
    table = here / "published.json"
    table.write_text(f"[[{LAYER}, {UNIT}, 9.0], [0, 3, 8.0], [1, 5, 7.0]]")
    command = ["neurons", "tiny", "photos", "--img-size", "64", "--out", str(here / "n.json"), "--against"]
    assert main([*command, f"{table}?top_k=2"]) == 0
    said = capsys.readouterr().out.splitlines()[-2]
    assert said.startswith(
        f"{table}?top_k=2: 1 of its 2 neurons are among those of the search here: {LAYER}.{UNIT} (rank 1); 1 are not: 0.3 "
    )
    assert said.endswith("; 0 of the search are missing")
    assert main([*command, str(here / "gone.json")]) == 2
    assert "gone.json, the file of neurons, does not exist" in capsys.readouterr().err


def test_neurons_draws_from_many_images_and_leaves_out_what_is_no_image(here, capsys):
    (here / "mixed").mkdir()
    for i in range(6):
        Image.fromarray(picture(i)).save(here / "mixed" / f"{i}.png")
    (here / "mixed" / "broken.png").write_bytes(b"no image")
    out = here / "neurons.json"
    command = ["neurons", "tiny", str(here / "mixed"), "photos/00.png", "--img-size", "64", "--out", str(out)]
    assert main(command) == 1
    assert json.loads(out.read_text())["images"] == 7
    assert "left out: " in (printed := capsys.readouterr().err)
    assert "broken.png cannot be read as an image" in printed
    assert main([*command, "--limit", "3", "--threshold", "50", "--layer", "-2"]) in (0, 1)
    about = json.loads(out.read_text())
    assert about["images"] in (2, 3)  # the broken one may be among those drawn
    assert (about["seed"], about["detect_layer"], about["threshold"]) == (0, 4, 50.0)


def test_neurons_says_that_a_model_has_no_outliers(here, capsys):
    out = here / "neurons.json"
    assert main(["neurons", "quiet", "photos", "--img-size", "64", "--out", str(out)]) == 0
    assert capsys.readouterr().out.startswith("no outliers in 12 images: after the last block but one the largest")
    assert json.loads(out.read_text())["selected"] == {}
    assert main(["export", "quiet", "--neurons", str(out), "--out", str(here / "out")]) == 2
    assert "names no register neurons: the search found no outliers to move" in capsys.readouterr().err


def test_look_takes_the_first_backbone_with_neurons_and_writes_a_picture(here, capsys):
    assert main(["look", "photos/00.png", "--img-size", "64", "--out", str(here / "a.png")]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith("1 of 64 patches are outliers: norm over ")
    assert lines[0].endswith("; 0 with 1 register")
    assert lines[1].startswith("CLS attention on them, blocks 3 to 5: ")
    assert lines[2] == str(here / "a.png")
    assert Image.open(here / "a.png").width == 1024


def test_look_shows_images_at_224_pixels_where_the_model_takes_them(here, monkeypatch):
    sizes = []
    monkeypatch.setattr(
        regvit.report.look, "draw_look", lambda path, seen, title: sizes.append((len(seen.image), title))
    )
    assert main(["look", "photos/00.png"]) == 0
    assert sizes == [(224, "Outlier tokens in tiny")]


def test_look_works_on_an_image_without_outliers(here, capsys):
    assert main(["look", "grey.png", "--backbone", "quiet", "--img-size", "64", "--out", str(here / "a.png")]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith("no neurons file: searched on this image alone; `regvit neurons quiet IMAGES` makes")
    assert lines[1].startswith("no outliers were found (after block 4: largest norm ")
    assert (here / "a.png").is_file()


def test_export_writes_what_load_opens(here, capsys):
    neurons = "features/neurons/tiny.json"
    assert main(["export", "tiny", "--neurons", neurons, "--out", str(here / "cured"), "--num-registers", "2"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith("module differs from the hooked model by 0.0e+00 of an output's largest value at most")
    assert lines[1:] == ["outputs: pooled, cls, registers, patches; 64 px, any batch size", str(here / "cured")]
    opened = load(here / "cured")
    assert opened.model.num_prefix_tokens == 3
    assert json.loads((here / "cured" / "registers.json").read_text())["neurons"] == {str(LAYER): [UNIT]}


def test_export_writes_a_run_with_its_cure(here, capsys):
    found = json.loads(Path("features/neurons/tiny.json").read_text())
    detection = {"layer": found["detect_layer"], "threshold": found["threshold"]}
    selected = {LAYER: (UNIT,)}
    write_run(
        here / "masked.json",
        Path("data/backbones/tiny"),
        Variant("none", 0, cure="mask_attention"),
        selected,
        detection,
    )
    assert main(["export", "tiny", "--run", str(here / "masked.json"), "--out", str(here / "out")]) == 0
    assert capsys.readouterr().out.startswith("module differs from the hooked model by 0.0e+00")
    opened = load(here / "out").model
    assert (opened.cure, opened.num_prefix_tokens) == ("mask_attention", 1)


WRONG = [  # of `look` an image is given first, if none is
    (["look", "missing.png"], "look: there is no file missing.png; give the path of an image\n"),
    (["look", "photos"], "photos is a folder, and one image is drawn; give a file in it, as `regvit look photos/"),
    (["look", "features/neurons/tiny.json"], "tiny.json cannot be read as an image: not an image"),
    (["look", "--out", "/proc/a.png"], "--out /proc/a.png cannot be written"),
    (["look", "--out", "folder.png"], "--out folder.png is a folder; name a file in it"),
    (["look", "--backbone", ""], "there is no backbone '': "),
    (["look", "--backbone", "quite"], "there is no backbone 'quite': did you mean quiet?"),
    (["look", "--backbone", "vit_tinny_patch16_224"], "file:<path> or vit_tiny_patch16"),
    (["look", "--backbone", "data/backbones/nope"], "backbone.json is missing; a backbone is a folder"),
    (["look", "--backbone", "resnet18"], "ResNet has no list of transformer blocks at `.blocks`; use a timm ViT"),
    (
        ["look", "--backbone", "file:w", "--architecture", "swin_tiny_patch4_window7_224"],
        "SwinTransformer has no list of",
    ),
    (["look", "--backbone", "file:data/backbones/tiny/weights.safetensors"], "needs its architecture"),
    (["look", "--img-size", "60"], "img_size 60 is not a multiple of the patch size 8"),
    (["look", "--device", "abacus"], "--device abacus is not here; use auto, cpu, cuda or cuda:<n>"),
    (["look", "--device", "cuda:99"], "--device cuda:99 is not here"),
    (["look", "--device", "meta"], "--device meta is not here"),
    (["look", "--neurons", "nope.json"], "nope.json cannot be used: No such file"),
    (["look", "--neurons", "photos"], "photos cannot be used: Is a directory"),
    (["look", "--neurons", "grey.txt"], "grey.txt is no neurons file: Invalid JSON"),
    (["look", "--neurons", "grey.png"], "grey.png is no neurons file"),
    (["look", "--neurons", "list.json"], "list.json is no neurons file: Input should be an object"),
    (["look", "--neurons", "data/backbones/tiny/backbone.json"], "no neurons file: threshold: Field required"),
    (["look", "--neurons", "features/neurons/tiny.json", "--backbone", "quiet"], "quiet has"),
    (["look", "--neurons", "nan.json"], "threshold: Input should be a finite number"),
    (["look", "--neurons", "half.json"], "give threshold and detect_layer, or neither"),
    (["look", "--neurons", "word.json"], "detect_layer: Input should be a valid integer"),
    (["look", "--neurons", "flat.json"], "selected: Input should be an object"),
    (["look", "--neurons", "text.json"], "selected.4: Input should be a valid array"),
    (["neurons", "tiny", "photos", "--out", "photos"], "--out photos is a folder; name a file in it"),
    (["neurons", "tiny", "photos", "--out", "grey.png/x.json"], "cannot be written (grey.png: File exists)"),
    (["neurons", "tiny", "nope/"], "nope is neither a file nor a folder"),
    (["neurons", "tiny", "data/backbones/tiny"], "holds no file with the suffix of an image format"),
    (["neurons", "tiny", "photos", "--threshold", "3", "--img-size", "64"], "threshold 3.0 needs its layer"),
    (["neurons", "tiny", "empty.png"], "none of the 1 images can be read"),
    (["export", "tiny", "--neurons", "features/neurons/tiny.json", "--out", "photos"], "holds '00.png'"),
    (["export", "tiny", "--neurons", "features/neurons/tiny.json", "--out", "x", "--patches", "no"], "expected one of"),
]
BAD_NEURONS = {
    "nan.json": {"threshold": float("nan")},
    "half.json": {"detect_layer": None},
    "word.json": {"detect_layer": "last"},
    "flat.json": {"selected": [1, 2]},
    "text.json": {"selected": {"4": "x"}},
}


@pytest.mark.parametrize(("command", "message"), WRONG, ids=[" ".join(command) for command, _ in WRONG])
def test_what_the_user_got_wrong_is_one_message_without_a_traceback(here, capsys, command, message):
    Path("grey.txt").write_text("no JSON")
    Path("list.json").write_text("[]")
    Path("empty.png").write_bytes(b"")
    Path("folder.png").mkdir(exist_ok=True)
    for name, fault in BAD_NEURONS.items():
        about = {"threshold": 9.0, "detect_layer": 4, "selected": {"4": [1]}} | fault
        Path(name).write_text(json.dumps(about))
    if command[0] == "look" and command[1].startswith("--"):
        command = ["look", "grey.png", *command[1:]]
    assert main(command) == 2
    printed = capsys.readouterr().err
    assert f"regvit {command[0]}: " in printed
    assert message in printed
    assert "Traceback" not in printed


def test_a_table_that_others_published_is_taken_for_neurons(here):
    (here / "table.json").write_text(json.dumps([[LAYER, UNIT, 9.5]]))
    assert main(["export", "tiny", "--neurons", str(here / "table.json"), "--out", str(here / "cured")]) == 0
    assert json.loads((here / "cured/registers.json").read_text())["neurons"] == {str(LAYER): [UNIT]}


def test_a_pipe_and_what_lies_in_dev_are_written_to_and_never_replaced(here, monkeypatch):
    command, pipe = ["neurons", "quiet", "grey.png", "--img-size", "64", "--out"], here / "pipe"
    os.mkfifo(pipe)
    with subprocess.Popen(["cat", str(pipe)], stdout=subprocess.PIPE, text=True) as reader:
        assert main([*command, str(pipe)]) == 0
        assert json.loads(reader.stdout.read())["backbone"] == "quiet"
    assert pipe.is_fifo()
    replaced = []
    monkeypatch.setattr(regvit.cli.outputs, "write_text", lambda path, text: replaced.append(path))
    with (here / "log").open("w+") as log:  # /dev/fd/N leads to a plain file, as /dev/stdout does in `regvit … > log`
        log.write("sent before\n")
        log.flush()
        assert main([*command, f"/dev/fd/{log.fileno()}"]) == 0
    assert (here / "log").read_text().splitlines()[:2] == ["sent before", "{"]
    assert replaced == []


def test_a_search_that_is_interrupted_leaves_the_file_that_was_there(here, monkeypatch):
    out = here / "neurons.json"
    out.write_text("earlier")

    def full(*_):
        raise OSError(28, "No space left on device", str(out))

    monkeypatch.setattr(Path, "write_bytes", full)
    assert main(["neurons", "tiny", "photos", "--img-size", "64", "--out", str(out)]) == 2
    assert out.read_text() == "earlier"
    assert list(here.iterdir()) == [out]


@pytest.mark.parametrize(
    "command", [["look", "grey.png", "--backbone", "focus_planted"], ["neurons", "focus_planted", "grey.png"],
                ["export", "focus_planted", "--neurons", "grey.png", "--out", "x"]],
)  # fmt: skip
def test_outside_of_the_repository_every_command_says_the_same_of_a_backbones_name(
    tmp_path, monkeypatch, project, capsys, command
):
    monkeypatch.chdir(tmp_path)
    shutil.copy(project / "grey.png", tmp_path)
    assert main(command) == 2
    assert capsys.readouterr().err == (
        f"regvit {command[0]}: there is no backbone 'focus_planted': run `make repro` first, or go into a repository that has "
        "data/backbones, or give a folder, file:<path> or timm:<model>\n"
    )
    assert main(["look", "grey.png"]) == 2
    assert "run `make repro` first, or go into a repository that has data/backbones, or name" in capsys.readouterr().err


def test_the_version_is_printed(capsys):
    assert main(["--version"]) == 0
    assert capsys.readouterr().out == f"regvit {metadata.version('regvit')}\n"


def test_a_terminal_that_cannot_show_a_name_gets_another_character_and_no_error(here, monkeypatch):
    Image.new("RGB", (64, 64), (90, 120, 60)).save(here / "猫.png")
    terminal = io.TextIOWrapper(io.BytesIO(), "cp1252")
    monkeypatch.setattr(sys, "stdout", terminal)
    assert main(["look", str(here / "猫.png"), "--backbone", "quiet", "--out", str(here / "鳥.png")]) == 0
    terminal.flush()
    assert terminal.buffer.getvalue().splitlines()[-1].endswith(b"?.png")


def test_what_is_wrong_with_image_output_or_architecture_is_told_before_a_model_is_opened(here, monkeypatch, capsys):
    monkeypatch.setattr(regvit.models.backbones, "load_backbone", lambda *_: pytest.fail("the model was opened"))
    made = timm.create_model
    monkeypatch.setattr(timm, "create_model", lambda *args, pretrained, **more: (
        pytest.fail("the hub was asked") if pretrained else made(*args, **more)))  # fmt: skip
    for command in (["missing.png"], ["photos"], ["grey.png", "--out", "grey.png/a.png"]):
        assert main(["look", *command]) == 2
    assert main(["look", "grey.png", "--backbone", "timm:resnet18"]) == 2
    assert "ResNet has no list of transformer blocks" in capsys.readouterr().err


def test_an_output_that_cannot_be_written_is_called_by_the_name_that_was_given(here, monkeypatch, capsys):
    def refuse(**_):
        raise PermissionError(13, "Permission denied", str(here / "tmpfile"))

    monkeypatch.setattr(regvit.cli.outputs.tempfile, "TemporaryFile", refuse)
    assert main(["look", "grey.png", "--out", str(here / "a.png")]) == 2
    message = capsys.readouterr().err
    assert f"--out {here / 'a.png'} cannot be written (Permission denied); give a file in a folder that you" in message


@pytest.mark.parametrize("command", [["look", "{broken}"], ["neurons", "tiny", "{broken}"]])
def test_a_broken_image_is_told_without_the_cure_of_a_data_set(here, capsys, command):
    (here / "broken.jpg").write_bytes(b"no image")
    main([word.format(broken=here / "broken.jpg") for word in command])
    message = capsys.readouterr().err
    assert f"{here / 'broken.jpg'} cannot be read as an image: " in message
    assert "data set" not in message


def test_a_look_at_a_large_photograph_takes_hardly_longer_than_at_a_small_one(here):
    """Less than three times without the imports, which take longer than a small look: less than twice with them."""
    noise = Image.fromarray(np.random.default_rng(0).integers(0, 256, (300, 400, 3), dtype=np.uint8))
    noise.save(here / "small.jpg")
    noise.resize((6000, 4500)).save(here / "large.jpg")  # 27 megapixels

    def seconds(photograph: str) -> float:
        began, out = time.process_time(), here / f"{photograph}.png"
        assert main(["look", str(here / photograph), "--out", str(out)]) == 0 and out.is_file()
        return time.process_time() - began

    seconds("small.jpg")  # what is imported or drawn for the first time
    assert seconds("large.jpg") < 3 * seconds("small.jpg")


def test_an_interrupt_ends_with_130(here, monkeypatch, capsys):
    def interrupt(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(regvit.report.look, "look", interrupt)
    assert main(["look", "grey.png"]) == 130
    assert capsys.readouterr().err == "\ninterrupted\n"


@pytest.mark.parametrize("bug", ["torch.zeros(2) @ torch.zeros(3)", "int('x')", "{}['missing']", "1 / 0"])
def test_a_bug_keeps_its_traceback(here, monkeypatch, bug):
    monkeypatch.setattr(regvit.report.look, "look", lambda *_: eval(bug, {"torch": torch}))
    with pytest.raises((RuntimeError, ValueError, KeyError, ZeroDivisionError)):
        main(["look", "grey.png"])


def test_as_a_module_it_is_the_same_and_help_has_examples_and_needs_nothing_that_takes_seconds_to_import():
    code = (
        "import runpy, sys\n"
        "for command in ([], ['look'], ['neurons'], ['census'], ['export']):\n"
        "    sys.argv = ['regvit', *command, '--help']\n"
        "    try: runpy.run_module('regvit', run_name='__main__')\n"
        "    except SystemExit as ended: assert ended.code == 0\n"
        "slow = {'torch', 'numpy', 'timm', 'matplotlib', 'zarr', 'sklearn', 'pandas'} & set(sys.modules)\n"
        "assert not slow, slow"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "Usage: regvit [OPTIONS] COMMAND" in done.stdout
    for command in ("look", "neurons", "census", "export"):
        assert f"Usage: regvit {command} " in done.stdout and f"examples:\n    regvit {command} " in done.stdout


EXPORT = ["export", "tiny", "--neurons", "n.json", "--out", "x"]


@pytest.mark.parametrize(
    ("command", "message"),
    [
        (["paint"], "No such command 'paint'."),
        (["look"], "Missing argument 'IMAGE'."),
        (["look", "a.png", "--out", "a.jpg"], "a.jpg does not end in .png"),
        (["look", "a.png", "--num-registers", "0"], "'--num-registers': Input should be greater than or equal to 1"),
        ([*EXPORT, "--num-registers", "65"], "'--num-registers': Input should be less than or equal to 64"),
        (["look", "a.png", "--num-registers", "few"], "'--num-registers': Input should be a valid integer"),
        (["neurons", "tiny", "a.png", "--threshold", "nan"], "nan is not a finite number"),
        (["neurons", "tiny", "a.png", "--threshold", "much"], "'--threshold': Input should be a valid number"),
        (["neurons", "tiny", "a.png", "--limit", "0"], "'--limit': Input should be greater than or equal to 1"),
        ([*EXPORT, "--scale", "inf"], "inf is not a finite number"),
        (
            ["export", "tiny", "--out", "x"],
            "give --neurons, a file of register neurons, or --run, a run of the pipeline",
        ),
        (["export", "tiny", "--run", "r.json", "--scale", "2", "--out", "x"], "r.json says which registers it has"),
        (["look", "a.png", "--colour"], "No such option: --colour"),
    ],
)
def test_a_command_that_is_not_understood_ends_with_2(command, message, capsys):
    assert main(command) == 2
    assert message in capsys.readouterr().err


def test_the_bound_of_registers_is_that_of_the_library():
    assert regvit.cli.options.MAX_REGISTERS == regvit.registers.test_time.MAX_REGISTERS


def test_census_says_of_each_model_whether_registers_can_help_and_appends_a_row(here, capsys):
    out = here / "census.csv"
    words = ["--images", "photos", "--img-size", "64", "--out", str(out)]
    assert main(["census", "tiny", "quiet", *words]) == 0
    said = capsys.readouterr().out.splitlines()
    assert said[0].startswith("tiny: registers can help here: 1.56% of the patches are outliers after block ")
    assert said[1].startswith("quiet: no outliers: largest / median norm at most ")
    assert main(["census", "random:test_vit", "--images", "photos", "--out", str(out)]) == 0
    rows = list(csv.DictReader(out.read_text().splitlines()))
    assert [(row["model"], row["outliers"], row["kind"] == "none") for row in rows] == [
        ("tiny", "yes", False),
        ("quiet", "none", True),
        ("random:test_vit", "none", True),
    ]
    assert rows[0]["neurons"] == "1"
    assert float(rows[0]["norm_ratio"]) > 5 > float(rows[1]["norm_ratio"])
    (here / "other.csv").write_text("a,b\n1,2\n")
    assert main(["census", "tiny", *words[:-1], str(here / "other.csv")]) == 2
    assert "has the columns a, b, not those of a census; give another --out" in capsys.readouterr().err
