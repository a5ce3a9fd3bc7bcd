"""`regvit export`: writes a backbone with its test-time registers baked in."""

from __future__ import annotations

import argparse
from pathlib import Path

from regvit.cli.backbone import open_backbone
from regvit.cli.errors import WrongInput
from regvit.cli.neurons_file import read_neurons
from regvit.cli.options import BACKBONES, FORMATS, add_backbone_options, add_num_registers, number
from regvit.cli.repository import repository


def add(commands: argparse._SubParsersAction) -> None:
    """The words of `regvit export`, and what runs it."""
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
    add_num_registers(parser)
    parser.add_argument("--statistic", default="per_neuron", help="per_neuron, per_neuron_patches or reference")
    parser.add_argument("--patches", default="zero", help="zero, mean, only_outliers or same")
    parser.add_argument("--scale", type=number, default=1.0, help="factor on a register's value; default: %(default)s")
    parser.add_argument("--pt2", action="store_true", help="write model.pt2, for torch.export.load")
    parser.add_argument("--onnx", action="store_true", help="write model.onnx; needs the package onnx")
    add_backbone_options(parser, "the backbone's own", device=False)
    parser.set_defaults(run=_export)


def _export(arguments: argparse.Namespace) -> None:
    from regvit.registers.export import export  # why here and not above: see cli.py

    arguments.device = "cpu"
    backbone = open_backbone(arguments.backbone, arguments, repository(Path.cwd()))
    _, neurons = read_neurons(arguments.neurons, backbone)
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
