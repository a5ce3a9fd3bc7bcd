"""Object discovery exactly as published: LOST, DINO-seg and TokenCut, one setting, every image at its own size.

The image is normalised and padded with zeros on the right and below to whole patches; boxes of LOST and TokenCut end at its
own edges. LOST sorts degrees by torch's sort, which is not stable, takes features as they are and a bias in their own
units; DINO-seg looks at one head, and takes the background where its mask is one component, as the code does. All images
with boxes count. So CorLoc can be held against LOST's tables, and against Darcet's with the feature and bias told there.

Deviation: registers are not counted as patches. Ours, which squashes images, sweeps settings and orders ties:
`regvit.measures.dense.discovery`.

Sources: Siméoni et al. 2021, arXiv:2109.14279; Caron et al. 2021, arXiv:2104.14294; Wang et al. 2022, arXiv:2202.11539, and
their code. Shape letters: p patch, d channel, h head.
"""

from __future__ import annotations

from contextlib import nullcontext
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Float
from scipy import ndimage
from torch import Tensor
from tqdm.auto import tqdm

from regvit.data.decoding import read_rgb
from regvit.data.manifest import Dataset
from regvit.measures.dense.discovery import K_PATCHES, MASS, boxes_around, lost
from regvit.measures.training_free.token_cut import TAU, token_cut
from regvit.models.attention import watch_prefix_attention
from regvit.models.backbones import Backbone
from regvit.models.hooks import blocks
from regvit.models.positions import positions_of
from regvit.models.token_features import Feature, watch_patch_features
from regvit.models.tokens import TokenLayout

METHODS = ("lost", "dino_seg", "token_cut")


@dataclass(frozen=True)
class Published:
    """The one setting.

    Args:
        kind: of the features of LOST and TokenCut: `k`, `q`, `v` or `token`.
        layer: block that they are of; negative ones count from the end.
        normalised: whether LOST's are L2-normalised (TokenCut's always are).
        bias: added to LOST's similarities, in their own units.
        k_patches: of LOST.
        tau: of TokenCut.
        head: of the last block's attention, which DINO-seg looks at.
    """

    kind: str = "k"
    layer: int = -1
    normalised: bool = False
    bias: float = 0.0
    k_patches: int = K_PATCHES
    tau: float = TAU
    head: int = 4


def discover_published(backbone: Backbone, dataset: Dataset, how: Published) -> dict[str, Float[np.ndarray, "b 4"]]:
    """The box of each image by every method, in its pixels; DINO-seg only where the model has CLS and that many heads."""
    device, patch = next(backbone.model.parameters()).device, backbone.model.patch_embed.patch_size
    found: dict[str, list] = {method: [] for method in METHODS}
    for row in tqdm(range(len(dataset)), f"discover_published {dataset.name}", unit="image", mininterval=1):
        pixels = torch.from_numpy(np.array(read_rgb(dataset.image_path(row)))).permute(2, 0, 1)
        image = padded(backbone.transform.normalise(pixels[None])[0], patch).to(device)
        for method, box in boxes_of(backbone.model, image, tuple(pixels.shape[1:]), how).items():
            found[method].append(box)
    return {method: np.array(boxes, dtype=float) for method, boxes in found.items() if boxes}


def padded(image: Float[Tensor, "3 h w"], patch: tuple[int, int]) -> Float[Tensor, "3 i j"]:
    """Zeros on the right and below, to whole patches."""
    rows, columns = ((-side) % own for side, own in zip(image.shape[1:], patch, strict=True))
    return F.pad(image, (0, columns, 0, rows))


@torch.inference_mode()
def boxes_of(
    model: torch.nn.Module, image: Float[Tensor, "3 i j"], size: tuple[int, int], how: Published
) -> dict[str, Float[np.ndarray, " 4"]]:
    """Boxes in pixels of one padded image, of (height, width) without padding."""
    layout, (height, width), last = TokenLayout.of(model), model.patch_embed.patch_size, len(blocks(model)) - 1
    grid = (image.shape[1] // height, image.shape[2] // width)
    feature = Feature(how.kind, range(last + 1)[how.layer])
    with (
        positions_of(model, grid),
        watch_patch_features(model, [feature]) as seen,
        watch_prefix_attention(model, [last]) if layout.cls else nullcontext({}) as attention,
    ):
        model.forward_features(image[None])
    features, scale = seen[feature].float(), np.array([width, height, width, height])
    own = F.normalize(features, dim=-1) if how.normalised else features
    found = {
        "lost": lost(own @ own.mT, grid, how.bias, how.k_patches, stable=False).boxes[0] * scale,
        "token_cut": token_cut(features, grid, how.tau).boxes[0] * scale,
    }
    for box in found.values():
        box[2:] = np.minimum(box[2:], size[::-1])
    if layout.cls and how.head < attention[last].shape[1]:
        weights = layout.patches(attention[last][0].mT)[..., 0]  # (h, p)
        found["dino_seg"] = dino_seg(weights[how.head], grid) * scale
    return found


def dino_seg(attention: Float[Tensor, " p"], grid: tuple[int, int]) -> np.ndarray:
    """Box in patches around the largest component of the patches that hold `MASS` of one head's attention.

    As published, the last component takes no part, and where there is only one it is the background that counts.
    """
    ascending, order = attention.sort()
    kept = ((ascending / ascending.sum()).cumsum(0) > 1 - MASS)[order.argsort()]
    components, count = ndimage.label(kept.reshape(grid).cpu().numpy())
    sizes = [int((components == one).sum()) for one in range(count)]
    largest = int(np.argmax(sizes[1:])) + 1 if len(sizes) > 1 else 0
    mask = components == largest
    return boxes_around((mask if mask.any() else ~mask)[None])[0]
