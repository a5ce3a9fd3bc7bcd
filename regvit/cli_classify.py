"""`regvit classify`: classes of images, by a run of the pipeline and the probes trained on it."""

from __future__ import annotations

import argparse
import csv
import io
import sys
from pathlib import Path

from .cli_device import named_device
from .cli_errors import in_words
from .cli_images import images_at
from .cli_options import FORMATS, add_machine_options
from .cli_outputs import check_out, write
from .cli_repository import repository, run_file


def add(commands: argparse._SubParsersAction) -> None:
    """The words of `regvit classify`, and what runs it."""
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
    add_machine_options(parser, batches=True)
    parser.set_defaults(run=_classify)


def _classify(arguments: argparse.Namespace) -> int:
    from .classify import Classifier  # why here and not above: see cli.py
    from .images import UnreadableImage
    from .runs import read_run

    if arguments.out:
        check_out(arguments.out)
    root = repository(Path.cwd())
    images = images_at(arguments.images)
    path = run_file(arguments.of, root)
    backbone = arguments.backbone or (root or Path()) / "data" / "backbones" / read_run(path)["backbone"]
    classifier = Classifier.load(
        backbone,
        path,
        arguments.probes or path.with_name("probes.safetensors"),
        arguments.readout,
        classifier=arguments.classifier,
        seed=arguments.seed,
        device=named_device(arguments.device),
    )
    files = [images.image_path(i) for i in range(len(images))]
    rows, broken = [], 0
    for result in classifier.stream(files, arguments.batch_size, arguments.workers):
        if isinstance(result, UnreadableImage):
            broken += 1
            print(f"left out: {in_words(result)}", file=sys.stderr)
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
        write(arguments.out, table.getvalue())
    return 1 if broken else 0
