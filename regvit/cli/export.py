"""`regvit export`: writes a backbone with its test-time registers, or a run with its cure, baked in."""

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
  regvit export focus_planted --run features/runs/mask_attention.json --out masked --onnx

\b
then:
  backbone = regvit.load("cured")                              # .model, a plain timm model; .transform
  program = torch.export.load("cured/model.pt2").module()      # torch alone
  session = onnxruntime.InferenceSession("cured/model.onnx")
"""


def export(
    backbone: BackboneArgument,
    out: Annotated[Path, typer.Option(metavar="FOLDER", help="New, empty, or an earlier export.")],
    neurons: Annotated[
        Path | None, typer.Option(metavar="FILE", help="From `regvit neurons` or the identify stage.")
    ] = None,
    run: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE",
            help="Instead: a run of the pipeline, features/runs/<run>.json, with its registers and its cure.",
        ),
    ] = None,
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
    """Write a backbone with its test-time registers, or a run with its cure, baked in.

    What is written is safetensors and JSON that regvit.load(FOLDER) opens, and on request graphs that need none of this
    software. Each is compared with the model that it was made of: no value of an output may differ by more than 0.0001 of
    that output's largest. The graphs take images (b, 3, size, size), normalised, of any batch size b, and give pooled,
    cls, registers and patches.
    """
    if (neurons is None) == (run is None):
        raise WrongInput("give --neurons, a file of register neurons, or --run, a run of the pipeline: one of the two")
    if run is not None and (num_registers, statistic, patches, scale) != (1, "per_neuron", "zero", 1.0):
        raise WrongInput(
            f"{run} says which registers it has; leave out --num-registers, --statistic, --patches, --scale"
        )
    from regvit.registers.export import export as write_export  # why here and not above: see __init__
    from regvit.registers.export import export_run
    from regvit.registers.run_files import read_run

    opened, graphs = open_backbone(backbone, architecture, img_size), {"pt2": pt2, "onnx": onnx}
    if run is not None:
        written = export_run(opened, read_run(run), out, **graphs)
    else:
        _, selected = read_neurons(neurons, opened)
        if not selected:
            raise WrongInput(f"{neurons} names no register neurons: the search found no outliers to move")
        options = {"statistic": statistic, "patches": patches, "scale": scale}
        written = write_export(opened, selected, out, num_registers, **options, **graphs)
    for name, difference in written.differences.items():
        print(f"{name:<6} differs from the hooked model by {difference:.1e} of an output's largest value at most")
    if onnx and "onnx" not in written.differences:
        print("onnx   was not compared, as onnxruntime is not installed")
    print(f"outputs: {', '.join(written.outputs)}; {opened.transform.size} px, any batch size")
    print(written.folder)
