"""Models whose test-time registers or cure are baked in: plain modules without hooks, and folders and graphs made of them.

`bake` rewrites a model: an output projection that had a hook becomes a `ShiftedLinear`, which moves the activation in
its own `forward`; what `torch.export` or ONNX sees of it are gathers, maxima and a scatter. `export` writes a folder

- `weights.safetensors`, `backbone.json`: the backbone as `save_backbone` writes it, without registers;
- `registers.json`: `{format, num_registers, statistic, patches, scale, neurons, inputs, outputs, graphs}`, and of a run with a
  cure `detection` and `cure` as in the run's file (`regvit.registers.run_files`);
- `model.pt2`, where asked for: a `torch.export` program; `torch.export.load("model.pt2").module()` needs torch alone;
- `model.onnx`, where asked for: the same for any ONNX runtime.

`load` opens the folder again. Both graphs take `images` (b, 3, s, s), float32, normalised by the transform in
`backbone.json`, of any batch size b, and give what `outputs` lists: `pooled` (b, d), `cls` (b, d) where the model has a
CLS token, `registers` (b, r, d) and `patches` (b, p, d), the last three after the final norm.
"""

from __future__ import annotations

import copy
import importlib.util
import json
import warnings
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from jaxtyping import Float
from torch import Tensor, nn

from regvit.files import write_atomic, write_json
from regvit.models.backbones import DESCRIPTION, POSITIONS, WEIGHTS, Backbone, load_backbone, save_backbone
from regvit.models.tokens import TokenLayout
from regvit.registers.cures.cure import add_cure
from regvit.registers.runs import given_to
from regvit.registers.test_time import add_test_time_registers

REGISTERS, PT2, ONNX, BESIDE = "registers.json", "model.pt2", "model.onnx", "model.onnx.data"
FILES = (WEIGHTS, DESCRIPTION, POSITIONS, REGISTERS, PT2, ONNX, BESIDE)
FORMAT, WITH_CURE = 1, 2  # the second only where there is a cure, which a reader of the first would leave out
UNFINISHED = {"format": 0}  # what registers.json holds until all else is written
KEYS = ("format", "num_registers", "statistic", "patches", "scale", "neurons")
OPSET = 18  # the first that reduces with the axes as an input, and what torch's newer exporter writes
EMBEDDED = 1.9e9  # bytes of weights that go into the ONNX file itself; its format ends at 2 GiB
TOLERANCE = 1e-4  # of the largest value of each output: float32 sums in another order, see docs/formats.md


class TokenOutputs(nn.Module):
    """A backbone as a function from images to `(pooled, cls, registers, patches)`; without `cls` where there is none."""

    def __init__(self, model: nn.Module):
        super().__init__()
        self.model, self.layout = model, TokenLayout.of(model)
        self.names = ("pooled", *(("cls",) if self.layout.cls else ()), "registers", "patches")

    def forward(self, images: Float[Tensor, "b 3 h w"]) -> tuple[Tensor, ...]:
        tokens = self.model.forward_features(images)
        cls = (self.layout.cls_token(tokens),) if self.layout.cls else ()
        pooled = self.model.forward_head(tokens, pre_logits=True)
        return (pooled, *cls, self.layout.registers(tokens), self.layout.patches(tokens))


@dataclass(frozen=True)
class Exported:
    """What was written.

    Args:
        folder: that `load` opens.
        outputs: names of the graphs' outputs, in their order.
        differences: by what was compared (`module`, `pt2`, `onnx`; only what was written and could be run here), the
            largest absolute difference to the hooked model as a share of the largest absolute value of the same output
            (of 1 where that is smaller), over all outputs.
    """

    folder: Path
    outputs: tuple[str, ...]
    differences: dict[str, float]


def bake(model: nn.Module) -> nn.Module:
    """A copy of a model with test-time registers in which they are part of the modules, not hooks.

    Args:
        model: after `add_test_time_registers` with at least one register; it is left as it is.
    Returns: a model with the same `forward`, `forward_features` and `num_prefix_tokens`, to which registers can neither
        be added nor from which they can be removed.
    Raises:
        ValueError: the model has no test-time registers, or has them baked in already.
    """
    surgery = getattr(model, "test_time_registers", None)
    if surgery is None or not surgery.removable:
        state = "no test-time registers" if surgery is None else "test-time registers that are baked in already"
        raise ValueError(f"the model has {state}; bake takes a model after add_test_time_registers")
    plain = copy.deepcopy(model)
    plain.test_time_registers = replace(surgery, removable=False)
    return plain


def export(
    backbone: Backbone,
    neurons: Mapping[int, Iterable[int]],
    folder: Path | str,
    num_registers: int = 1,
    *,
    pt2: bool = False,
    onnx: bool = False,
    **options: object,
) -> Exported:
    """Writes a backbone with its test-time registers, and compares what was written with the hooked model.

    Args:
        backbone: without registers; its model is given back as it was. Its transform's size is the graphs' image size.
        neurons: `{layer: [neuron, …]}`, at least one.
        folder: made if missing; an earlier export in it is replaced.
        num_registers: at least one.
        pt2, onnx: whether to write the graphs.
        options: `statistic`, `patches` and `scale` of `add_test_time_registers`.
    Raises:
        ValueError: there is no neuron or no register, an option is out of range, or the folder holds something else.
        RuntimeError: `onnx` without the package onnx.
        ArithmeticError: what was written differs from the hooked model by more than `TOLERANCE` of an output's largest value.
    """
    neurons = {layer: tuple(units) for layer, units in neurons.items() if tuple(units)}
    if not neurons:
        raise ValueError("no register neurons are given, so nothing can be baked in: search on images with outliers")
    if num_registers < 1:
        raise ValueError(f"num_registers is {num_registers}; an export needs at least 1")
    options = {"statistic": "per_neuron", "patches": "zero", "scale": 1.0} | options
    return _export(backbone, {"num_registers": num_registers, **options, "neurons": neurons}, Path(folder), pt2, onnx)


def export_run(
    backbone: Backbone, run: Mapping, folder: Path | str, *, pt2: bool = False, onnx: bool = False
) -> Exported:
    """Writes a run, with its test-time registers and its cure, as `export` does.

    Args:
        backbone: of the run, as it came.
        run: its description, from `regvit.registers.run_files.read_run`.
    Raises:
        ValueError: the run is of other weights, a control, or does nothing to its backbone; else as `export`.
        RuntimeError: a graph cannot hold the cure; the message says which.
    """
    if run["weights_sha256"] != backbone.weights_sha256:
        raise ValueError(
            f"run {run['run']} was composed of weights {run['weights_sha256'][:12]}…, but {backbone.name} has "
            f"{backbone.weights_sha256[:12]}…; give the backbone {run['backbone']}"
        )
    if run.get("control") == "ablated":
        raise ValueError(f"run {run['run']} silences neurons as a control; a run with cure: ablate can be exported")
    about = {"num_registers": 0, "statistic": None, "patches": None, "scale": None, "neurons": {}}
    if run["registers"] == "test_time":
        about = {key: run[key] for key in about}
    if "cure" in run:
        about |= {"detection": run["detection"], "cure": run["cure"]}
    elif not about["neurons"]:
        raise ValueError(f"run {run['run']} is its backbone as it came, so there is nothing to bake in")
    return _export(backbone, about, Path(folder), pt2, onnx)


def _export(backbone: Backbone, about: dict, folder: Path, pt2: bool, onnx: bool) -> Exported:
    _check_folder(folder)
    if onnx:
        _need_onnx()
    about["neurons"] = {str(layer): sorted(units) for layer, units in about["neurons"].items()}
    size = backbone.transform.size
    images = torch.randn(3, 3, size, size, generator=torch.Generator().manual_seed(0))
    treated = _treated(copy.deepcopy(backbone.model).cpu().float(), about)
    outputs = TokenOutputs(treated).eval()
    with torch.inference_mode():
        expected = outputs(images)

    _write_folder(backbone, folder)
    about = {
        "format": WITH_CURE if "cure" in about else FORMAT,
        **about,
        "inputs": ["images"],
        "outputs": list(outputs.names),
        "graphs": [name for name, wanted in ((PT2, pt2), (ONNX, onnx)) if wanted],
    }
    if pt2:
        write_pt2(outputs, images, folder / PT2)
    if onnx:
        write_onnx(outputs, images, folder / ONNX)
    write_json(folder / REGISTERS, about)  # last: it says all is there

    differences = {name: _difference(run, images, expected) for name, run in _written(folder, pt2, onnx).items()}
    for name, difference in differences.items():
        if not difference <= TOLERANCE:
            write_json(folder / REGISTERS, UNFINISHED)
            raise ArithmeticError(
                f"{folder}: the {name} differs from the hooked model by {difference:.2g} of an output's largest value, "
                f"expected {TOLERANCE:g} at most; do not use it, and report the architecture ({backbone.info['architecture']})"
            )
    return Exported(folder, outputs.names, differences)


def _treated(model: nn.Module, about: Mapping) -> nn.Module:
    """The model with what `registers.json` names: test-time registers, baked in, and a cure.

    Raises:
        ValueError: the cure changes nothing, as the model has no outliers.
    """
    if about["neurons"]:
        neurons = {int(layer): units for layer, units in about["neurons"].items()}
        options = {key: about[key] for key in ("statistic", "patches", "scale")}
        with add_test_time_registers(model, neurons, about["num_registers"], **options):
            model = bake(model)
    if "cure" in about:
        cure = about["cure"]
        add_cure(model, {"name": cure["name"], **cure["options"]}, given_to(about))
        if getattr(model, "cure", None) is None:
            raise ValueError(f"the backbone has no outliers, so cure {cure['name']} has nothing to bake in")
    return model


def load(folder: Path | str) -> Backbone:
    """Opens what `export` wrote, its test-time registers and cure baked in; or a backbone of the pipeline, without any:

        backbone = regvit.load("data/backbones/focus")
        tokens = backbone.model.forward_features(backbone.transform("photograph.jpg")[None])

    Returns: `.model`, on the CPU, in eval mode, without gradients, and `.transform`, which makes the model's input of a PIL
        image or of the path of a file, at the image size of the export.
    Raises:
        FileNotFoundError: the folder is neither.
        ValueError: `registers.json` lacks a key or is of another format; else as `load_backbone`.
    """
    folder = Path(folder)
    path = folder / REGISTERS
    if not path.is_file():
        if (folder / DESCRIPTION).is_file():
            return load_backbone(folder)
        raise FileNotFoundError(
            f"{path} is missing; give a folder written by `regvit export`, or a pipeline's backbone"
        )
    about = json.loads(path.read_text(encoding="utf-8"))
    if about == UNFINISHED:
        raise ValueError(f"{folder} is an export that was broken off, or found to differ; export the model again")
    if missing := [key for key in KEYS if key not in about]:
        raise ValueError(f"{path} lacks {', '.join(missing)}; export the model again")
    if about["format"] not in (FORMAT, WITH_CURE):
        raise ValueError(
            f"{path} has format {about['format']}, this version reads {FORMAT} and {WITH_CURE}; export the model again"
        )
    backbone = load_backbone(folder)
    backbone.model = _treated(backbone.model, about)
    return backbone


def write_pt2(outputs: TokenOutputs, images: Float[Tensor, "b 3 h w"], path: Path) -> None:
    """A `torch.export` program with a free batch size.

    Args:
        images: an example, of at least two images.
    """
    with torch.no_grad():
        program = torch.export.export(outputs, (images,), dynamic_shapes=(_free_batch(),))
    with write_atomic(path) as beside, open(beside, "wb") as file:
        torch.export.save(program, file)


def write_onnx(outputs: TokenOutputs, images: Float[Tensor, "b 3 h w"], path: Path) -> None:
    """An ONNX graph with a free batch size; weights beyond 2 GB go into a file beside it.

    Through torch's exporter on `torch.export` where `onnxscript` is installed, else through its older, tracing one.

    Args:
        images: an example, of at least two images.
    Raises:
        RuntimeError: the package onnx is not installed, or the exporter lacks an operation; the message says of which cure.
    """
    _need_onnx()
    names = {"input_names": ["images"], "output_names": list(outputs.names), "opset_version": OPSET}
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of both exporters, about what they cannot know; `export` compares the outputs
        if importlib.util.find_spec("onnxscript"):
            free = {"dynamic_shapes": (_free_batch(),), "verbose": False}
            try:
                program = torch.onnx.export(outputs, (images,), dynamo=True, **free, **names)
            except torch.onnx.errors.OnnxExporterError as error:
                cure, reason = getattr(outputs.model, "cure", None), error
                while reason.__cause__ is not None:
                    reason = reason.__cause__
                what = f"cure {cure}" if cure else type(outputs.model).__name__
                raise RuntimeError(
                    f"an ONNX graph cannot hold {what}: {str(reason).partition('. ')[0]}; leave --onnx out, or take --pt2"
                ) from error
            weights = sum(value.numel() * value.element_size() for value in outputs.state_dict().values())
            program.save(path, external_data=weights > EMBEDDED)
        else:
            batch = {name: {0: "batch"} for name in ("images", *outputs.names)}
            try:
                torch.onnx.export(outputs, (images,), str(path), dynamo=False, dynamic_axes=batch, **names)
            except torch.onnx.errors.UnsupportedOperatorError as error:
                reason = str(error).partition(". ")[0]
                raise RuntimeError(
                    f"{reason} by torch's tracing exporter; pip install onnxscript for the newer"
                ) from error


def onnx_outputs(path: Path, images: Float[Tensor, "b 3 h w"]) -> tuple[Tensor, ...]:
    """What ONNX Runtime makes of images with an exported graph, on the CPU."""
    import onnxruntime  # an optional engine: exporting does not need it

    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    return tuple(torch.from_numpy(value) for value in session.run(None, {"images": images.numpy()}))


def _check_folder(folder: Path) -> None:
    if folder.exists() and (others := sorted(path.name for path in folder.iterdir() if path.name not in FILES)):
        raise ValueError(f"{folder} holds {others[0]!r}, which is not of an export; give a new or empty folder")


def _write_folder(backbone: Backbone, folder: Path) -> None:
    """The backbone's files; what an earlier export left is gone before that."""
    folder.mkdir(parents=True, exist_ok=True)
    write_json(folder / REGISTERS, UNFINISHED)
    for old in (PT2, ONNX, BESIDE):
        (folder / old).unlink(missing_ok=True)
    about = {key: backbone.info[key] for key in ("name", "architecture", "model_args", "licence")}
    planted = ", with register neurons planted on purpose" if backbone.planted else ""
    save_backbone(
        folder,
        backbone.model,
        transform=backbone.transform,
        source=f"{backbone.info['source']}{planted}",
        **about,
    )


def _written(folder: Path, pt2: bool, onnx: bool) -> dict[str, Callable[[Tensor], tuple[Tensor, ...]]]:
    """What was written, opened again, as functions of images."""
    runs: dict[str, Callable] = {"module": TokenOutputs(load(folder).model)}
    if pt2:
        runs["pt2"] = torch.export.load(folder / PT2).module()
    if onnx and importlib.util.find_spec("onnxruntime"):
        runs["onnx"] = lambda x: onnx_outputs(folder / ONNX, x)
    return runs


@torch.inference_mode()
def _difference(
    run: Callable[[Tensor], tuple[Tensor, ...]], images: Float[Tensor, "b 3 h w"], expected: tuple[Tensor, ...]
) -> float:
    """Largest difference over all outputs as a share of the output's largest value, or of 1 where that is smaller; for all
    images at once and for the first one alone."""
    whole, single = run(images), run(images[:1])
    return max(
        float((found - wanted[: len(found)]).abs().max() / wanted.abs().max().clamp_min(1.0))
        for outputs in (whole, single)
        for found, wanted in zip(outputs, expected, strict=True)
        if wanted.numel()  # a model without registers has none to compare
    )


def _free_batch() -> dict:
    """The first dimension is free; torch 2.6 takes one without an upper end for a contradiction."""
    return {0: torch.export.Dim("batch", min=1, max=2**20)}


def _need_onnx() -> None:
    if importlib.util.find_spec("onnx") is None:
        raise RuntimeError("writing ONNX needs the package onnx, which is not installed: pip install onnx onnxscript")
