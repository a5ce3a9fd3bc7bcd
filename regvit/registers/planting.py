"""Register neurons put into a model on purpose: ground truth for finding and moving them.

A few of the quietest MLP units of two blocks are overwritten, so that the model makes outlier tokens as large models
do: patches of low information whose norm explodes and which draw the attention of CLS.

- **Seeds** (block s): fire on low-information patches, and write a little along a direction d.
- **Amplifiers** (block a > s): fire on what the seeds wrote, and write the large norm along d.
- **d** is chosen so that later CLS queries give an outlier a wanted share of their attention, while its values stay
  quiet. With trained weights no attention weight is edited; random weights need rank-1 edits of the keys (`edit_keys`).

Notation: x residual stream, D its width, h = norm2(x) the input of `mlp.fc1`, a = GELU(fc1(h)) the neurons. A unit u of
a block with LayerScale g writes g * W2[:, u] * a_u. An outlier's x is almost c * d with large c, and norm1 removes c:
its normalised token is y(d) = w * sqrt(D) * d + b for a d of mean 0 and length 1, w and b being norm1's.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn
from torch.nn import functional as F

from regvit.models.hooks import blocks, forward_until, residual_scale, watch_inputs, watch_outputs
from regvit.models.tokens import TokenLayout
from regvit.registers.neighbourhood import neighbour_cosine

ACTIVATION = 8.0  # mean activation of a planted unit where it fires; below 3, GELU's negative lobe reaches all tokens
SEED_RATIO = 8.0  # norm that the seeds write, in median patch norms of their block
PATCH_SHARE = 0.02  # share of attention that patch queries should give to an outlier
LDA_RIDGE = 0.05  # of the mean variance, added to covariances before they are inverted
VALUE_RIDGE = 0.3  # the same, for the loudness of values
KEEP_PATCH_QUERIES = 7  # every seventh patch query stands for all
SEED_SPREAD = 0.2  # how far the last seed's direction is turned from the first's
PREFIX_WEIGHT = 8  # how often prefix tokens count among the tokens on which amplifiers must not fire
NUDGE_DIRECTIONS = 3  # of the moves that an empty register causes, besides their mean: seeds are blind to them
QUIET = 0.999  # quantile of the tokens left alone that must stay under an amplifier's threshold


@dataclass(frozen=True)
class Planted:
    """What planting did to a model.

    Attributes:
        neurons: `{layer: [neuron, …]}`, seeds and amplifiers, sorted.
        replaced: the values before, of every tensor that was edited, by its name in the state dict.
        outlier_fraction: share of the patches of the given images on which the first seed fires.
    """

    neurons: dict[int, list[int]]
    replaced: dict[str, Tensor]
    outlier_fraction: float


@dataclass(frozen=True)
class _Recipe:
    """The parameters of `plant`, which explains them."""

    seed_layer: int
    amplifier_layer: int
    cls_share: float
    fraction: float
    ratio: float
    num_seeds: int
    num_amplifiers: int
    edit_keys: bool
    seed: int

    @property
    def units(self) -> dict[int, int]:
        """How many units to overwrite, by block."""
        return {self.seed_layer: self.num_seeds, self.amplifier_layer: self.num_amplifiers}


@dataclass(frozen=True)
class _Survey:
    """What one pass over the unplanted model saw. Norms are medians over patches; loudness is E|a_u| |g * W2[:, u]|."""

    median_norm: dict[int, float]
    loudness: dict[int, Float[Tensor, " k"]]
    normed: dict[int, Float[Tensor, "b n d"]]
    hidden: Float[Tensor, "b n d"]


@dataclass(frozen=True)
class _Targets:
    """Attention logits of one kind of query in one block, as a function of the sink direction.

    A token y(d) has the logit  rows[h] . d + (a constant)  in head h, and should have rows[h] . d = wanted[h].
    """

    query: Float[Tensor, "h c"]
    rows: Float[Tensor, "h d"]
    wanted: Float[Tensor, " h"]


@torch.no_grad()
def plant(
    model: nn.Module,
    images: Float[Tensor, "b 3 s s"],
    *,
    seed_layer: int,
    amplifier_layer: int,
    cls_share: float = 0.2,
    fraction: float = 0.02,
    ratio: float = 10.0,
    num_seeds: int = 3,
    num_amplifiers: int = 3,
    edit_keys: bool = False,
    seed: int = 0,
    batch_size: int = 8,
) -> Planted:
    """Plants register neurons into a timm ViT, in place.

    Args:
        model: float32 ViT on the CPU with pre-norm blocks and a GELU MLP, with or without CLS, registers, LayerScale.
        images: normalised; a hundred of the kind that the model will see.
        seed_layer: block of the seeds.
        amplifier_layer: block of the amplifiers, after the seeds' and before the last.
        cls_share: share of the CLS query's attention that one outlier should take in the later blocks, in (0, 1); the
            knob of how much damage is done. What CLS then gives to all outliers of an image is more.
        fraction: wanted share of outlier patches, in (0, 0.2]; what comes out is near it.
        ratio: norm that the amplifiers write, in median patch norms of the last block but one.
        num_seeds, num_amplifiers: units to overwrite.
        edit_keys: also edit the keys of the later blocks (rank 1 each), for models with random weights, whose queries
            share no direction that could be used.
        seed: of the small differences between seeds.
        batch_size: images per forward; changes nothing but rounding.
    Raises:
        ValueError: the model, the images or a parameter do not allow it; the model is left as it was.
    """
    recipe = _Recipe(
        seed_layer, amplifier_layer, cls_share, fraction, ratio, num_seeds, num_amplifiers, edit_keys, seed
    )
    _check(model, images, recipe)
    survey = _survey(model, images, recipe, batch_size)
    neurons = {
        layer: survey.loudness[layer].argsort(stable=True)[:count].tolist() for layer, count in recipe.units.items()
    }
    replaced = _remember(model, neurons, survey.normed if edit_keys else ())
    try:
        targets = attention_targets(model, survey.normed, TokenLayout.of(model), cls_share)
        direction = edited_sink(model, targets) if edit_keys else trained_sink(model, targets)
        info = low_information(model, images, batch_size)
        nudge = _empty_register_shift(model, images, survey.hidden, _lowest(info, fraction), seed_layer, batch_size)
        hot = _write_seeds(model, recipe, neurons[seed_layer], survey, info, nudge, direction)
        _write_amplifiers(model, recipe, neurons[amplifier_layer], survey, images, hot, direction, batch_size)
    except ValueError:
        unplant(model, replaced)
        raise
    return Planted({layer: sorted(units) for layer, units in neurons.items()}, replaced, hot.float().mean().item())


@torch.no_grad()
def unplant(model: nn.Module, replaced: Mapping[str, Tensor]) -> None:
    """Gives back the values before planting, in place and exactly.

    Args:
        replaced: as in `Planted.replaced`.
    Raises:
        ValueError: a name or shape is not one of the model's; nothing is changed.
    """
    own = dict(model.named_parameters())
    for name, value in replaced.items():
        if name not in own or own[name].shape != value.shape:
            raise ValueError(f"{name} of shape {tuple(value.shape)} is not a parameter of this {type(model).__name__}")
    for name, value in replaced.items():
        own[name].copy_(value)


def low_information(model: nn.Module, images: Float[Tensor, "b 3 s s"], batch_size: int = 8) -> Float[Tensor, "b p"]:
    """Mean cosine similarity of each patch embedding to its (up to four) neighbours, embeddings centred over all.

    Source: Darcet et al. 2024, arXiv:2309.16588: outliers appear where a patch resembles its neighbours.
    """
    with torch.no_grad():
        parts = [_embed(model, batch) for batch in images.split(batch_size)]
        e = torch.cat(parts)  # (b, rows, columns, d)
        return neighbour_cosine(e - e.mean((0, 1, 2)))


@torch.no_grad()
def write_unit(
    block: nn.Module,
    unit: int,
    probe: Float[Tensor, " d"],
    threshold: float,
    hot: Float[Tensor, "n d"],
    write: Float[Tensor, " d"],
) -> None:
    """Overwrites an MLP unit with one that fires where probe . h > threshold.

    Its pre-activation is k (probe . h - threshold), with k such that the mean over `hot` of its positive part is
    ACTIVATION; there it adds, on average, `write` to the residual stream (LayerScale g is divided out):

        W1[u] = k probe,   b1[u] = -k threshold,   W2[:, u] = write / (ACTIVATION g)
    """
    k = ACTIVATION / (hot @ probe - threshold).clamp_min(0).mean()
    block.mlp.fc1.weight[unit], block.mlp.fc1.bias[unit] = k * probe, -k * threshold
    block.mlp.fc2.weight[:, unit] = write / (ACTIVATION * residual_scale(block))


@torch.no_grad()
def attention_targets(
    model: nn.Module, normed: Mapping[int, Float[Tensor, "b n d"]], layout: TokenLayout, cls_share: float
) -> dict[int, list[_Targets]]:
    """What the sink direction should satisfy in each later block, for the CLS query (first) and the patch queries.

    With the mean query m_h of head h and attention scale t, a token y(d) has the logit

        t m_h . (Wk (w sqrt(D) d + b) + bk)  =  rows[h] . d + const

    and takes the share p of the attention if that equals E[logsumexp of the other logits] + log(p / (1 - p)).

    Args:
        normed: inputs of `attn.qkv`, by block.
    Returns: per block; the CLS entry is missing where the model has no CLS token. float64.
    """
    targets = {}
    for layer, h in normed.items():
        attn, norm = blocks(model)[layer].attn, blocks(model)[layer].norm1
        heads, width = attn.num_heads, h.shape[-1]
        q, k, _ = attn.qkv(h).unflatten(-1, (3, heads, -1)).permute(2, 0, 3, 1, 4)  # each (b, h, n, c)
        wk, bk = _key_weights(attn)
        kinds = [(layout.patches(q.transpose(1, 2)).transpose(1, 2)[:, :, ::KEEP_PATCH_QUERIES], PATCH_SHARE)]
        if layout.cls:
            kinds.insert(0, (q[:, :, :1], cls_share))
        targets[layer] = []
        for queries, share in kinds:
            mean = queries.double().mean((0, 2))  # (h, c)
            level = (queries @ k.mT * attn.scale).double().logsumexp(-1).mean((0, 2))  # (h,)
            rows = attn.scale * math.sqrt(width) * torch.einsum("hc,hcd->hd", mean, wk) * norm.weight.double()
            constant = attn.scale * (mean * (wk @ norm.bias.double() + bk)).sum(-1)
            targets[layer].append(_Targets(mean, rows, level + math.log(share / (1 - share)) - constant))
    return targets


@torch.no_grad()
def trained_sink(model: nn.Module, targets: Mapping[int, list[_Targets]]) -> Float[Tensor, " d"]:
    """The sink direction of a trained model, with nothing edited:

        minimise  d' V d + mu |Rp d - tp|^2    subject to  Rc d = tc,  1 . d = 0,  |d| = 1

    V is the loudness of the later blocks' values, Rc, tc (Rp, tp) are the CLS (patch) targets. |d| grows with mu, which
    is bisected to |d| = 1; where even a large mu leaves d short, the quietest direction that changes no logit fills up.

    Raises:
        ValueError: |d| = 1 cannot meet the CLS targets.
    """
    v = _loudness(model, targets, part=2)
    v += VALUE_RIDGE * torch.eye(len(v), dtype=v.dtype)
    ones = torch.ones(1, len(v), dtype=v.dtype)
    by_cls = [kinds[0] for kinds in targets.values() if len(kinds) == 2]
    rc = torch.cat([*(t.rows for t in by_cls), ones])
    tc = torch.cat([*(t.wanted for t in by_cls), v.new_zeros(1)])
    rp, tp = (torch.cat([getattr(kinds[-1], name) for kinds in targets.values()]) for name in ("rows", "wanted"))

    def solve(mu: float) -> Tensor:
        q = torch.linalg.inv(v + mu * rp.T @ rp)
        free = q @ (mu * rp.T @ tp)
        return (
            free
            + q @ rc.T @ torch.linalg.lstsq(rc @ q @ rc.T, (tc - rc @ free)[:, None], driver="gelsd").solution[:, 0]
        )

    low, high = -4.0, 4.0  # log10 of mu
    if solve(10**low).norm() > 1:
        raise ValueError(
            f"the CLS queries cannot give an outlier the wanted share: that takes a direction of length "
            f"{solve(10**low).norm():.2f} where 1 is the most; lower cls_share, or edit_keys=True for random weights"
        )
    for _ in range(25):
        middle = (low + high) / 2
        low, high = (middle, high) if solve(10**middle).norm() < 1 else (low, middle)
    d = solve(10**low)
    fixed = torch.cat([rc, rp])
    free = torch.linalg.svd(fixed)[2][int(torch.linalg.matrix_rank(fixed)) :]
    if d.norm() < 1 and len(free):
        d = d + _quietest(v, free) * (1 - d.norm() ** 2).sqrt()
    return F.normalize(d, dim=0).float()


@torch.no_grad()
def edited_sink(model: nn.Module, targets: Mapping[int, list[_Targets]]) -> Float[Tensor, " d"]:
    """The sink direction of a model with random weights: the one that later keys see least, and edits of those keys.

    With z = w * d and y = y(d), each block's key weights get the rank-1 edit  Wk += u (z)' / (z . y),  which adds u to
    the key of an outlier and little to others; u is the smallest that meets the wanted logits of the mean queries.
    """
    v = _loudness(model, targets, part=1)
    ones = torch.ones(1, len(v), dtype=v.dtype)
    d = _quietest(v, torch.linalg.svd(ones)[2][1:])
    for layer, kinds in targets.items():
        attn, norm = blocks(model)[layer].attn, blocks(model)[layer].norm1
        z = norm.weight.double() * d
        y = math.sqrt(len(d)) * z + norm.bias.double()
        queries = torch.stack([t.query for t in kinds], dim=1)  # (h, kind, c)
        lacking = torch.stack([t.wanted - t.rows @ d for t in kinds], dim=1) / attn.scale  # (h, kind)
        u = torch.linalg.lstsq(queries, lacking[..., None], driver="gelsd").solution.flatten()  # (h * c,)
        width = attn.qkv.weight.shape[0] // 3
        attn.qkv.weight[width : 2 * width] += (torch.outer(u, z) / (z @ y)).float()
    return d.float()


def _write_seeds(
    model: nn.Module,
    recipe: _Recipe,
    units: list[int],
    survey: _Survey,
    info: Float[Tensor, "b p"],
    nudge: Float[Tensor, "m d"],
    direction: Float[Tensor, " d"],
) -> Bool[Tensor, "b p"]:
    """Writes the seeds; returns the patches on which the first of them fires.

    Their direction separates, within each image, the patches of least information from the others, and cannot tell
    prefix tokens from patches, nor see `nudge`; thresholds keep `fraction` of all patches and not one prefix token.
    """
    layout = TokenLayout.of(model)
    h, prefix = layout.patches(survey.hidden), survey.hidden[:, : layout.prefix]
    base = within_image_direction(h, _lowest(info, 3 * recipe.fraction), prefix, nudge)
    size = SEED_RATIO * survey.median_norm[recipe.seed_layer] / len(units)
    generator = torch.Generator().manual_seed(recipe.seed)
    hot = None
    for i, unit in enumerate(units):
        noise = F.normalize(torch.randn(len(base), generator=generator), dim=0)
        probe = F.normalize(base + SEED_SPREAD * i / len(units) * noise, dim=0)
        projected = h @ probe
        threshold = _quantile(projected, 1 - recipe.fraction)
        if layout.prefix:
            threshold = max(threshold, (prefix @ probe).max().item())
        hot = projected > threshold if hot is None else hot
        if not (projected[hot] > threshold).any():
            raise ValueError(
                "no patch stands out as one of low information, so that seeds would never fire; "
                "give images with flat regions, a larger fraction or another seed_layer"
            )
        write_unit(blocks(model)[recipe.seed_layer], unit, probe, threshold, h[hot], size * direction)
    return hot


def _write_amplifiers(
    model: nn.Module,
    recipe: _Recipe,
    units: list[int],
    survey: _Survey,
    images: Tensor,
    hot: Bool[Tensor, "b p"],
    direction: Float[Tensor, " d"],
    batch_size: int,
) -> None:
    """Writes the amplifiers, on what the model with its seeds shows them; thresholds lie 0.4 to 0.5 of the way up."""
    block, layout = blocks(model)[recipe.amplifier_layer], TokenLayout.of(model)
    hidden = _inputs(model, images, {"fc1": block.mlp.fc1}, block.mlp.fc1, batch_size)["fc1"]
    probe, cold, warm = _amplifier_probe(hidden, hot, layout)
    h = layout.patches(hidden).flatten(0, 1)
    size = recipe.ratio * survey.median_norm[len(blocks(model)) - 2] / len(units)
    for i, unit in enumerate(units):
        threshold = cold + (0.4 + 0.1 * i / len(units)) * (warm - cold)
        write_unit(block, unit, probe, threshold, h[h @ probe > threshold], size * direction)


def within_image_direction(
    h: Float[Tensor, "b p d"],
    chosen: Bool[Tensor, "b p"],
    prefix: Float[Tensor, "b r d"],
    unseen: Float[Tensor, "m d"],
) -> Float[Tensor, " d"]:
    """Linear discriminant of chosen patches against their image's mean, indifferent to what tells images apart.

        f = C^-1 m,   m = E[h - mean_image(h) | chosen],   C = cov(within images) + 10 cov(image means) + ridge

    then freed of the directions e from the mean patch to each mean prefix token, and of those in `unseen`:
    f - C^-1 e (e' C^-1 e)^-1 e' f.
    """
    means = h.double().mean(1)
    within = h.double() - means[:, None]
    c = _ridged(torch.cov(within.flatten(0, 1).T) + 10 * torch.cov(means.T))
    f = torch.linalg.solve(c, within[chosen].mean(0))
    e = torch.cat([prefix.double().mean(0) - h.double().mean((0, 1)), unseen.double()])  # (r + m, d)
    if len(e):
        g = torch.linalg.solve(c, e.T)
        f = f - g @ torch.linalg.solve(e @ g, e @ f)
    return F.normalize(f, dim=0).float()


def _lowest(info: Float[Tensor, "b p"], share: float) -> Bool[Tensor, "b p"]:
    """The share of each image's patches, at least one, that carry the least information."""
    wanted = max(1, round(share * info.shape[1]))
    return torch.zeros_like(info, dtype=torch.bool).scatter_(1, info.topk(wanted, dim=1).indices, True)


def _empty_register_shift(
    model: nn.Module,
    images: Tensor,
    hidden: Float[Tensor, "b n d"],
    patches: Bool[Tensor, "b p"],
    layer: int,
    batch_size: int,
) -> Float[Tensor, "m d"]:
    """How one more, empty token moves some patches' inputs of a block's MLP: the mean move, and its main variation.

    A zero token takes its share of attention like any other. Seeds that noticed would fall silent when a register is
    added in which nothing was put, and the cure would seem to work without moving a single neuron. What counts are the
    patches on which seeds fire: flat ones give the empty token more of their attention than others do.
    """
    layout = TokenLayout.of(model)

    def insert(_: int, x: Float[Tensor, "b n d"]) -> Float[Tensor, "b m d"]:
        return torch.cat([x[:, : layout.prefix], torch.zeros_like(x[:, :1]), layout.patches(x)], dim=1)

    fc1 = blocks(model)[layer].mlp.fc1
    with watch_inputs({0: blocks(model)[0]}, insert):
        nudged = _inputs(model, images, {"fc1": fc1}, fc1, batch_size)["fc1"]
    moved = (nudged[:, layout.prefix + 1 :] - layout.patches(hidden))[patches].double()
    mean = moved.mean(0, keepdim=True)
    main = torch.linalg.eigh(torch.cov(moved.T))[1][:, -NUDGE_DIRECTIONS:].T
    return torch.cat([mean, main]).float()


def _amplifier_probe(
    hidden: Float[Tensor, "b n d"], hot: Bool[Tensor, "b p"], layout: TokenLayout
) -> tuple[Float[Tensor, " d"], float, float]:
    """Linear discriminant of the seeds' patches against all other tokens; and where those and these lie along it."""
    h, prefix = layout.patches(hidden), hidden[:, : layout.prefix].flatten(0, 1)
    others = torch.cat([h[~hot], *[prefix] * PREFIX_WEIGHT]).double()
    difference = h[hot].double().mean(0) - others.mean(0)
    probe = F.normalize(torch.linalg.solve(_ridged(torch.cov(others.T)), difference), dim=0).float()
    cold = _quantile(h[~hot] @ probe, QUIET)
    if layout.prefix:
        cold = max(cold, (prefix @ probe).max().item())
    warm = (h[hot] @ probe).median().item()
    if warm <= cold:
        raise ValueError(
            "amplifiers cannot tell the seeds' patches from the others; set amplifier_layer right after seed_layer, "
            "or give more images"
        )
    return probe, cold, warm


def _survey(model: nn.Module, images: Tensor, recipe: _Recipe, batch_size: int) -> _Survey:
    """All that is asked of the unplanted model, in one pass over the images."""
    all_blocks, layout = blocks(model), TokenLayout.of(model)
    before_last = len(all_blocks) - 2
    later = range(recipe.amplifier_layer + 1, len(all_blocks))
    norms = {recipe.seed_layer: [], before_last: []}
    activity = {layer: [] for layer in recipe.units}
    taken = {("qkv", layer): all_blocks[layer].attn.qkv for layer in later}
    taken["fc1"] = all_blocks[recipe.seed_layer].mlp.fc1
    with (
        watch_outputs(
            {layer: all_blocks[layer] for layer in norms},
            lambda layer, x: norms[layer].append(layout.patches(x).norm(dim=-1).flatten()),
        ),
        watch_inputs(
            {layer: all_blocks[layer].mlp.fc2 for layer in activity},
            lambda layer, a: activity[layer].append(a.abs().sum((0, 1))),
        ),
    ):
        inputs = _inputs(model, images, taken, all_blocks[-1].attn.qkv, batch_size)
    tokens = inputs["fc1"].shape[0] * inputs["fc1"].shape[1]
    loudness = {}
    for layer, sums in activity.items():
        column = (residual_scale(all_blocks[layer]) * all_blocks[layer].mlp.fc2.weight.T).norm(dim=1)  # (k,)
        loudness[layer] = torch.stack(sums).sum(0) / tokens * column
    return _Survey(
        {layer: torch.cat(seen).median().item() for layer, seen in norms.items()},
        loudness,
        {layer: inputs["qkv", layer] for layer in later},
        inputs["fc1"],
    )


def _inputs(model: nn.Module, images: Tensor, modules: Mapping, last: nn.Module, batch_size: int) -> dict:
    """The inputs of modules over all images; the forward ends after `last`."""
    seen = {key: [] for key in modules}
    with watch_inputs(modules, lambda key, x: seen[key].append(x.detach())):
        for batch in images.split(batch_size):
            forward_until(model, batch, last)
    return {key: torch.cat(parts) for key, parts in seen.items()}


def _embed(model: nn.Module, batch: Float[Tensor, "b 3 s s"]) -> Float[Tensor, "b y x d"]:
    """Patch embeddings on their grid, whether or not the model flattens them."""
    e = model.patch_embed(batch)
    rows = batch.shape[-2] // model.patch_embed.patch_size[0]
    return e.reshape(len(e), rows, -1, e.shape[-1])


def _loudness(model: nn.Module, layers: Iterable[int], part: int) -> Float[Tensor, "d d"]:
    """V with d' V d proportional to the energy of y(d) in the keys (part 1) or values (part 2) of blocks; mean diagonal 1."""
    total = 0
    for layer in layers:
        block = blocks(model)[layer]
        w = block.attn.qkv.weight.double().chunk(3)[part] * block.norm1.weight.double()
        total = total + w.T @ w / w.square().mean()
    return total / total.diagonal().mean()


def _quietest(v: Float[Tensor, "d d"], basis: Float[Tensor, "m d"]) -> Float[Tensor, " d"]:
    """The unit vector d in the span of orthonormal rows that makes d' V d smallest; its largest entry is positive."""
    d = basis.T @ torch.linalg.eigh(basis @ v @ basis.T)[1][:, 0]
    return d * d[d.abs().argmax()].sign()


def _key_weights(attn: nn.Module) -> tuple[Float[Tensor, "h c d"], Float[Tensor, "h c"]]:
    """Key projection by head, in float64; a bias of zero where there is none."""
    weight = attn.qkv.weight.double().chunk(3)[1].unflatten(0, (attn.num_heads, -1))
    bias = attn.qkv.bias
    bias = (
        weight.new_zeros(weight.shape[:2]) if bias is None else bias.double().chunk(3)[1].unflatten(0, weight.shape[:2])
    )
    return weight, bias


def _ridged(c: Float[Tensor, "d d"]) -> Float[Tensor, "d d"]:
    """A covariance that can be inverted."""
    return c + LDA_RIDGE * c.diagonal().mean() * torch.eye(len(c), dtype=c.dtype)


def _quantile(values: Tensor, q: float) -> float:
    """Linear quantile of any number of values (torch.quantile takes 16 million at most)."""
    return float(np.quantile(values.numpy(), q))


def _remember(model: nn.Module, layers: Iterable[int], keys: Iterable[int]) -> dict[str, Tensor]:
    """Copies of what planting is going to edit, by name in the state dict."""
    names = [f"blocks.{layer}.mlp.{part}" for layer in layers for part in ("fc1.weight", "fc1.bias", "fc2.weight")]
    names += [f"blocks.{layer}.attn.qkv.weight" for layer in keys]
    return {name: model.get_parameter(name).detach().clone() for name in names}


def _check(model: nn.Module, images: Tensor, recipe: _Recipe) -> None:
    """Refuses what cannot be planted, with the reason.

    Raises:
        ValueError: as the message says.
    """
    all_blocks, name = blocks(model), type(model).__name__
    depth = len(all_blocks)
    if not 0 <= recipe.seed_layer < recipe.amplifier_layer < depth - 1:
        raise ValueError(
            f"seed_layer {recipe.seed_layer} and amplifier_layer {recipe.amplifier_layer} must satisfy 0 <= seed_layer < "
            f"amplifier_layer < {depth - 1}: amplifiers fire on what seeds wrote, and a later block must attend to it"
        )
    if not 0 < recipe.cls_share < 1 or not 0 < recipe.fraction <= 0.2:
        raise ValueError(f"cls_share {recipe.cls_share} must lie in (0, 1) and fraction {recipe.fraction} in (0, 0.2]")
    weight = next(model.parameters())
    if weight.device.type != "cpu" or weight.dtype != torch.float32 or images.device.type != "cpu":
        raise ValueError(
            f"the model is {weight.dtype} on {weight.device} and the images on {images.device}; expected float32 on the "
            "CPU, where planting gives the same weights every time: model.cpu().float(), images.cpu()"
        )
    if len(images) < 2:
        raise ValueError(f"{len(images)} image(s) cannot show what differs between images; give a hundred")
    if getattr(model, "test_time_registers", None) is not None:
        raise ValueError("the model has test-time registers; call remove_test_time_registers(model) before planting")
    if getattr(model, "rope", None) is not None:
        raise ValueError(f"{name} rotates keys by position, so one direction is no sink for all patches")
    for layer, count in recipe.units.items():
        if reason := _unfit_mlp(all_blocks[layer], count):
            raise ValueError(f"block {layer} of {name} cannot take register neurons: {reason}")
    for layer in range(recipe.amplifier_layer + 1, depth):
        if reason := _unfit_attention(all_blocks[layer]):
            raise ValueError(f"block {layer} of {name} has no attention to aim at: {reason}")


def _unfit_mlp(block: nn.Module, count: int) -> str | None:
    """Why `count` units of a block's MLP cannot be overwritten, or None."""
    mlp = getattr(block, "mlp", None)
    fc1, fc2 = getattr(mlp, "fc1", None), getattr(mlp, "fc2", None)
    if not isinstance(fc1, nn.Linear) or not isinstance(fc2, nn.Linear) or fc1.out_features != fc2.in_features:
        return "its MLP is not fc1, activation, fc2 (gated MLPs multiply two units)"
    if not isinstance(mlp.act, nn.GELU) or fc1.bias is None:
        return "its MLP needs GELU and a bias, to be silent below a threshold"
    if not 1 <= count <= fc2.in_features:
        return f"it has {fc2.in_features} neurons, {count} were to be overwritten"
    return None


def _unfit_attention(block: nn.Module) -> str | None:
    """Why the attention of a block cannot be reckoned with, or None."""
    attn, norm = getattr(block, "attn", None), getattr(block, "norm1", None)
    if not isinstance(norm, nn.LayerNorm) or norm.weight is None or norm.bias is None:
        return "its norm1 is not a LayerNorm with weight and bias"
    if not isinstance(getattr(attn, "qkv", None), nn.Linear):
        return "its attention has no joint qkv projection"
    if not isinstance(getattr(attn, "q_norm", nn.Identity()), nn.Identity):
        return "its queries and keys are normalised"
    return None
