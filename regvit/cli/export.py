"""`regvit export`: writes a backbone with its test-time registers baked in."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from regvit.cli.backbone import open_backbone
from regvit.cli.errors import WrongInput
from regvit.cli.neurons_file import read_neurons
from regvit.cli.options import BACKBONES, Architecture, BackboneArgument, NumRegisters, finite

EXAMPLES = f"""{BACKBONES}
\b
examples:
  regvit export focus_planted --neurons features/neurons/focus_planted.json --out cured
  regvit export focus_planted --neurons neurons.json --out cured --img-size 224 --onnx --pt2

\b
then:
  backbone = regvit.load("cured")                              # .model, a plain timm model; .transform
  program = torch.export.load("cured/model.pt2").module()      # torch alone
  session = onnxruntime.InferenceSession("cured/model.onnx")
"""


def export(
    backbone: BackboneArgument,
    neurons: Annotated[Path, typer.Option(metavar="FILE", help="From `regvit neurons` or the identify stage.")],
    out: Annotated[Path, typer.Option(metavar="FOLDER", help="New, empty, or an earlier export.")],
    num_registers: NumRegisters = 1,
    statistic: Annotated[str, typer.Option(help="per_neuron, per_neuron_patches or reference.")] = "per_neuron",
    patches: Annotated[str, typer.Option(help="zero, mean, only_outliers or same.")] = "zero",
    scale: Annotated[float, typer.Option(callback=finite, help="Factor on a register's value.")] = 1.0,
    pt2: Annotated[bool, typer.Option("--pt2", help="Write model.pt2, for torch.export.load.")] = False,
    onnx: Annotated[bool, typer.Option("--onnx", help="Write model.onnx; needs the package onnx.")] = False,
    img_size: Annotated[
        int | None, typer.Option(min=1, metavar="PX", help="Side of the input; default: the backbone's own.")
    ] = None,
    architecture: Architecture = None,
) -> None:
    """Write a backbone with its test-time registers baked in.

    What is written is safetensors and JSON that regvit.load(FOLDER) opens, and on request graphs that need none of this
    software. Each is compared with the model that it was made of: no value of an output may differ by more than 0.0001 of
    that output's largest. The graphs take images (b, 3, size, size), normalised, of any batch size b, and give pooled,
    cls, registers and patches.
    """
    from regvit.registers.export import export as write_export  # why here and not above: see __init__

    opened = open_backbone(backbone, architecture, img_size)
    _, selected = read_neurons(neurons, opened)
    if not selected:
        raise WrongInput(f"{neurons} names no register neurons: the search found no outliers to move")
    options = {"statistic": statistic, "patches": patches, "scale": scale}
    written = write_export(opened, selected, out, num_registers, **options, pt2=pt2, onnx=onnx)
    for name, difference in written.differences.items():
        print(f"{name:<6} differs from the hooked model by {difference:.1e} of an output's largest value at most")
    if onnx and "onnx" not in written.differences:
        print("onnx   was not compared, as onnxruntime is not installed")
    print(f"outputs: {', '.join(written.outputs)}; {opened.transform.size} px, any batch size")
    print(written.folder)
