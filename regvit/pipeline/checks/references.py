"""What in params.yaml refers to what, and must be there and fit: backbones of runs, sets of measurements, sizes, layers."""

import re
from collections.abc import Iterator
from pathlib import Path

from regvit.pipeline.checks.architectures import architecture
from regvit.pipeline.checks.faults import nearest
from regvit.pipeline.schema import PACKAGES, Backbone, Identify, Params
from regvit.registers.cures.options import misplaced, parse_cure

LOCAL = ("folder", "file", "npy", "voc07", "voc12", "coco20k", "voc_segmentation", "ade20k", "nyu",
         "spair", "context60", "coco_object", "imagenet_seg", "landmarks")  # fmt: skip
NEEDED = {  # arrays of extract_dense by the measurement that reads them
    "tokens": ("patches", "norms"),
    "token_classes": ("patches",),
    "attention": ("attention",),
    "discover": ("inside",),
    "segment": ("patches",),
    "depth": ("patches",),
    "hummingbird": ("patches",),
    "correspond": ("patches",),
}


def broken_references(params: Params) -> Iterator[str]:
    """One sentence for each entry that names another which is not there, or does not fit it."""
    yield from _broken_sets(params)
    yield from _broken_measurements(params)
    yield from _broken_search(params.identify)
    for name, backbone in params.backbones.items():
        yield from _broken_backbone(f"backbones.{name}", backbone)
    yield from _broken_sizes(params)
    yield from _broken_runs(params)


def _broken_search(identify: Identify) -> Iterator[str]:
    for name in ("threshold", "sigma"):
        given = getattr(identify, name)
        if given is not None and identify.layer is None:
            yield f"identify.{name} is {given}, but identify.layer is null: norms differ by layer, set it too"
    for one, other in (("threshold", "sigma"), ("top_k", "percentile")):
        if getattr(identify, one) is not None and getattr(identify, other) is not None:
            yield f"identify.{one} and identify.{other} exclude each other: leave one out"
    if identify.score == "activation" and identify.top_k is None and identify.percentile is None:
        yield (
            "identify.score is activation, but identify.top_k is null: activations are no shares, set it too (10 to 50),"
            " or percentile"
        )


def broken_layers(params: Params) -> Iterator[str]:
    """Architectures that timm does not know, numbers of trained registers, and layers that a backbone does not have.

    Raises:
        OSError: what timm said cannot be kept in work/.
    """
    measured = {run.backbone for run in params.runs.values()} if params.attention.datasets else ()
    for name, backbone in params.backbones.items():
        try:
            known = architecture(model_of(backbone))
        except ValueError as error:
            yield f"backbones.{name}: {error}"
            continue
        wanted = [(f"identify.{key}", getattr(params.identify, key), 1) for key in ("layer", "max_layer")]
        if name in measured:
            wanted.append(("attention.first_layer", params.attention.first_layer, 1))
            wanted += [("attention.layers", layer, 1) for layer in params.attention.layers or ()]
        trained = known.trained + (backbone.train.registers if backbone.train else 0)
        if backbone.train and backbone.train.registers and known.trained:
            yield (
                f"backbones.{name}.train.registers is {backbone.train.registers}, but {model_of(backbone)} has"
                f" {known.trained} already: leave it out to train with these"
            )
            continue
        if backbone.plant:  # a block after the amplifiers must attend to what they wrote
            wanted.append((f"backbones.{name}.plant.amplifier_layer", backbone.plant.amplifier_layer, 2))
        for where, layer, after in wanted:
            if layer is not None and layer > known.depth - after:
                has = f"backbone {name} has {known.depth} blocks (0 to {known.depth - 1})"
                yield f"{where} is {layer}, expected at most {known.depth - after}: {has}"
        for run_name, run in params.runs.items():
            has = f"{name if backbone.train else model_of(backbone)} was trained with {trained}"
            if run.backbone == name and run.registers == "none" and trained:
                cure = f"cannot be left out: set registers: trained, num_registers: {trained}"
                yield f"runs.{run_name}.registers is none, but {has}, which {cure}"
            if run.backbone == name and run.registers == "trained" and run.num_registers != trained:
                cure = f"set num_registers: {trained}" if trained else "take a backbone with registers (…_reg4_…)"
                yield f"runs.{run_name}.num_registers is {run.num_registers}, but {has}: {cure}"


def broken_sources(params: Params) -> Iterator[str]:
    """Sources that there are none of, and folders and files that are not there."""
    from regvit.data.entry import ClassChoice  # here, as these take a second
    from regvit.data.sources import find_source

    for block in ("datasets", "scenes"):
        for name, entry in getattr(params, block).items():
            where = f"{block}.{name}"
            try:
                find_source(entry.source)
                yield from _missing(f"{where}.source", entry.source)
                if getattr(entry, "classes", None) is not None:
                    ClassChoice.of(entry.classes)
            except (ValueError, OSError) as error:
                yield f"{where}: {error}"
    for name, backbone in params.backbones.items():
        yield from _missing(f"backbones.{name}.source", backbone.source)
    for name, run in params.runs.items():
        yield from _missing(f"runs.{name}.neurons", run.neurons.partition("?")[0])


def _missing(where: str, source: str) -> Iterator[str]:
    kind, _, path = source.partition(":")
    path = Path(re.sub(r"(?<=\.npy):\d+$", "", path)).expanduser()
    if kind in LOCAL and not path.exists():
        yield f"{where}: {path} does not exist: put it there, or mend the path"


def model_of(backbone: Backbone) -> str:
    """timm's name of a backbone's architecture; empty where none is given."""
    kind, _, name = backbone.source.partition(":")
    if kind == "timm":
        return name.partition("@")[0]
    return PACKAGES.get(name, "") if kind == "package" else backbone.architecture or ""


def _broken_sets(params: Params) -> Iterator[str]:
    chosen, datasets, known = params.in_distribution, params.datasets, params.datasets | params.scenes
    if chosen not in datasets:
        yield f"in_distribution is {chosen!r}, which datasets does not have{nearest(chosen, datasets)}"
    elif datasets[chosen].role != "id":
        yield f"in_distribution is {chosen!r}, whose role is {datasets[chosen].role!r}: set its role to id, or name another"
    for name, entry in datasets.items():
        if entry.role == "id" and name != chosen:
            yield f"datasets.{name} has the role id, but in_distribution is {chosen!r}: make it ood or anomaly"
    for name in datasets.keys() & params.scenes.keys():
        yield f"scenes.{name} is also a name of datasets, and both would be data/{name}: rename one"
    if params.verify.pictures not in known:
        hint = nearest(params.verify.pictures, known)
        yield f"verify.pictures is {params.verify.pictures!r}, which neither datasets nor scenes has{hint}"


def _broken_measurements(params: Params) -> Iterator[str]:
    """Sets and runs that a measurement names and that are not there, or of which too little is kept."""
    datasets, runs, known, dense = (
        params.datasets,
        params.runs,
        params.datasets | params.scenes,
        params.extract_dense.datasets,
    )
    for name in dense:
        if name not in known:
            yield f"extract_dense.datasets has {name!r}, which neither datasets nor scenes has{nearest(name, known)}"
    for stage, arrays in NEEDED.items():
        for name in getattr(params, stage).datasets:
            if name not in dense:
                yield f"{stage}.datasets has {name!r}, which extract_dense.datasets lacks{nearest(name, dense) or ': add it'}"
            elif missing := [array for array in arrays if array not in dense[name].arrays]:
                lacks = ", ".join(missing)
                yield f"extract_dense.datasets.{name}.arrays lacks {lacks}, which {stage} reads: add it, or take {name} from {stage}.datasets"
    if params.depth.min_depth >= params.depth.max_depth:
        yield f"depth.min_depth is {params.depth.min_depth}, expected less than max_depth {params.depth.max_depth}"
    for name in params.retrieve.datasets:
        if name not in datasets:
            yield f"retrieve.datasets has {name!r}, which datasets does not have{nearest(name, datasets)}"
    for name in params.zeroshot.datasets:
        if name not in datasets:
            yield f"zeroshot.datasets has {name!r}, which datasets does not have{nearest(name, datasets)}"
    for name in {*params.zeroshot_segment.datasets, *params.zeroshot_segment.objects} - known.keys():
        yield f"zeroshot_segment has {name!r}, which neither datasets nor scenes has{nearest(name, known)}"
    for name in params.zeroshot.runs:
        if name not in runs:
            yield f"zeroshot.runs has {name!r}, which runs does not have{nearest(name, runs)}"
        elif runs[name].backbone not in params.zeroshot.text:
            yield f"zeroshot.text has no text tower for {runs[name].backbone}, the backbone of run {name}: add one"
    for name in params.zeroshot.text.keys() - params.backbones.keys():
        yield f"zeroshot.text.{name} is no backbone{nearest(name, params.backbones)}"
    references, pairs = params.compare.references, params.compare.pairs
    for name in sorted({each for pair in pairs for each in pair} - runs.keys()):
        yield f"compare.pairs names {name!r}, which runs does not have{nearest(name, runs)}"
    for name, other in pairs:
        if name == other:
            yield f"compare.pairs holds {name} against itself: name another"
    for name in sorted({*references, *references.values()} - runs.keys()):
        yield f"compare.references names {name!r}, which runs does not have{nearest(name, runs)}"
    for name, other in references.items():
        if name == other:
            yield f"compare.references.{name} is the run itself: name another"


def _broken_backbone(where: str, backbone: Backbone) -> Iterator[str]:
    """A source that holds no backbone, an architecture that is not given or another one, a planting out of order."""
    (kind, _, name), given, plant = backbone.source.partition(":"), backbone.architecture, backbone.plant
    if kind == "package" and name not in PACKAGES:
        yield f"{where}.source is {backbone.source!r}, a package that holds no backbone: known are {', '.join(PACKAGES)}"
    elif kind == "file" and given is None:
        yield f"{where}.architecture is missing: add timm's name of the model that the weights in {name} are of"
    elif given is not None and given.partition(".")[0] != model_of(backbone).partition(".")[0]:
        yield f"{where}.architecture is {given!r}, but {backbone.source} holds {model_of(backbone)}: leave it out"
    if backbone.train:
        yield from _broken_training(where, backbone)
    if plant and plant.amplifier_layer <= plant.seed_layer:
        yield (
            f"{where}.plant.amplifier_layer is {plant.amplifier_layer}, expected one after"
            f" seed_layer {plant.seed_layer}: amplifiers fire on what the seeds wrote"
        )


def _broken_training(where: str, backbone: Backbone) -> Iterator[str]:
    train = backbone.train
    if backbone.plant:
        yield (
            f"{where} has both plant and train: training would move the planted neurons, whose truth is known, and what"
            " planting replaced could not be given back: plant one backbone and train another"
        )
    if train.unfreeze == "none" and not train.registers:
        yield f"{where}.train.unfreeze is none and train.registers 0, so nothing would be trained: change one of them"
    if late := [step for step in train.checkpoints if step > train.steps]:
        yield f"{where}.train.checkpoints has {late[0]}, expected at most train.steps, {train.steps}"


def _broken_sizes(params: Params) -> Iterator[str]:
    """Sizes of images that a backbone cannot part into patches, where the name of its architecture says their size."""
    measured = sorted({run.backbone for run in params.runs.values()} & params.backbones.keys())
    wanted = [(f"backbones.{name}", name, backbone.img_size) for name, backbone in params.backbones.items()]
    for dataset, block in params.extract_dense.datasets.items():
        wanted += [(f"extract_dense.datasets.{dataset}", name, block.img_size) for name in measured]
    for where, name, size in wanted:
        named_patch = re.search(r"_patch(\d+)(?![^_.])", model_of(params.backbones[name]))
        patch = int(named_patch[1]) if named_patch else 1
        if size is not None and size % patch:
            low = max(size // patch, 1) * patch
            cure = f"use {low} or {low + patch}"
            yield f"{where}.img_size is {size}, no multiple of {patch}, the patch size of backbone {name}: {cure}"


def _broken_runs(params: Params) -> Iterator[str]:
    for name, run in params.runs.items():
        where = f"runs.{name}"
        if run.backbone not in params.backbones:
            hint = nearest(run.backbone, params.backbones)
            yield f"{where}.backbone is {run.backbone!r}, which backbones does not have{hint}"
        if run.registers == "test_time" and run.num_registers < 1:
            yield f"{where}.num_registers is {run.num_registers}, expected at least 1 where registers is test_time"
        if run.registers == "none" and run.num_registers != 0:
            yield f"{where}.num_registers is {run.num_registers}, expected 0 where registers is none"
        wanted = {"ablated": "none", "selected": run.registers}.get(run.neurons, "test_time")
        if run.registers != wanted:
            yield f"{where}.neurons is {run.neurons}, which needs registers: {wanted}, not {run.registers}"
        if run.cure is not None:
            try:
                reason = misplaced(parse_cure(run.cure)[0], run.registers, run.neurons)
            except ValueError as error:
                reason = str(error)
            if reason:
                yield f"{where}.cure: {reason}"
