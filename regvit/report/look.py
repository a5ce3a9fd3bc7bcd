"""One image seen through a backbone, before and after test-time registers: norms, CLS attention, features as colours.

One palette (`feature_colours`) paints both columns. It is fitted on the patches of both that are no outliers in the
untreated model.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
from jaxtyping import Bool, Float, UInt8
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from torch import Tensor, nn

from regvit.files import write_picture
from regvit.measures.feature_colours import fit_palette
from regvit.measures.gallery import OUTLIER, norm_colours, normal_range, short
from regvit.measures.verification import run_forward
from regvit.models.hooks import blocks
from regvit.models.tokens import TokenLayout
from regvit.registers.outliers import Detection
from regvit.registers.test_time import add_test_time_registers

INK, PALE = "#1b1f24", "#6a737d"  # text, lesser text
DPI, WIDTH = 160, 6.4  # pixels an inch, inches: 1,024 pixels, as a phone is wide
HEAD, ROW = 0.4, 3.7  # inches: of the title, and of a row of maps with its headings


@dataclass(frozen=True)
class View:
    """What one model makes of one image; patches in reading order.

    Args:
        norms: L2 norm of each patch at the output of the detection layer.
        attention: of CLS on each patch, mean over heads and the later blocks; None where there is no CLS token.
        on_registers: CLS attention on all test-time registers together; likewise None.
        features: patch tokens after the final norm.
    """

    norms: Float[np.ndarray, " p"]
    attention: Float[np.ndarray, " p"] | None
    on_registers: float | None
    features: Float[np.ndarray, "p d"]


@dataclass(frozen=True)
class Look:
    """An image before and after test-time registers.

    Args:
        image: as the model sees it, before normalisation.
        before, after: without and with test-time registers; `after` is None where there are no register neurons.
        layer: block at whose output norms are compared.
        threshold: norm over which a patch is an outlier; None where the model has none.
        later: blocks over which CLS attention is averaged, those after the last register neuron.
        num_registers: in `after`.
    """

    image: UInt8[np.ndarray, "s s 3"]
    before: View
    after: View | None
    layer: int
    threshold: float | None
    later: tuple[int, ...]
    num_registers: int

    @property
    def outliers(self) -> Bool[np.ndarray, " p"]:
        """Which patches are outliers in the untreated model."""
        return self.over(self.before)

    def over(self, view: View) -> Bool[np.ndarray, " p"]:
        """Which patches of a view are over the threshold."""
        return view.norms > (np.inf if self.threshold is None else self.threshold)

    def attention_on_outliers(self, view: View) -> float | None:
        """Share of the view's CLS attention on the patches that are outliers in the untreated model."""
        return None if view.attention is None else float(view.attention[self.outliers].sum())

    def sentences(self) -> list[str]:
        """The figures in words, a line each."""
        n, total = int(self.outliers.sum()), self.outliers.size
        norms = f"largest norm {short(self.before.norms.max())}, median {short(np.median(self.before.norms))}"
        if self.threshold is None:
            return [f"no outliers were found (after block {self.layer}: {norms})"]
        limit = f"norm over {short(self.threshold)} after block {self.layer}"
        if not n:
            return [f"no outliers: none of {total} patches has a {limit} ({norms})"]
        lines = [f"{n} of {total} patches are outliers: {limit} ({norms})"]
        if self.after is None:
            return [*lines, "no register neurons are known, so nothing was moved"]
        lines[0] += f"; {int(self.over(self.after).sum())} with {_registers(self.num_registers)}"
        if self.before.attention is not None:
            shares = [self.attention_on_outliers(view) for view in (self.before, self.after)]
            lines.append(
                f"CLS attention on them, blocks {self.later[0]} to {self.later[-1]}: {shares[0]:.1%}, then {shares[1]:.1%}; "
                f"{self.after.on_registers:.1%} on {_registers(self.num_registers)}"
            )
        return lines


def look(
    model: nn.Module,
    image: UInt8[Tensor, "3 s s"],
    normalised: Float[Tensor, "1 3 s s"],
    detection: Detection | None,
    neurons: dict[int, tuple[int, ...]],
    num_registers: int = 1,
) -> Look:
    """Runs the model on one image, as it is and with test-time registers; it is given back as it was.

    Args:
        model: a timm ViT without test-time registers.
        image: decoded; shown in the picture.
        normalised: the same, on the model's device.
        detection: layer and threshold of the model's outliers; None where it has none.
        neurons: the register neurons, `{layer: (neuron, …)}`; may be empty.
        num_registers: to add, at least 1.
    Raises:
        ValueError: num_registers is below 1, or the model cannot be treated (see `add_test_time_registers`).
    """
    if num_registers < 1:
        raise ValueError(f"num_registers is {num_registers}; expected 1 or more to look at")
    depth = len(blocks(model))
    layer = depth - 2 if detection is None else detection.layer
    if not 0 <= layer < depth:
        raise ValueError(
            f"the detection layer is {layer}, but the model has {depth} blocks (0 to {depth - 1}); "
            "give the neurons file of this model"
        )
    first = max(neurons) + 1 if neurons else depth // 2
    later = tuple(range(min(first, depth - 1), depth))
    before, after = _view(model, normalised, layer, later), None
    if neurons:
        with add_test_time_registers(model, neurons, num_registers):
            after = _view(model, normalised, layer, later)
    threshold = None if detection is None else detection.threshold
    return Look(image.permute(1, 2, 0).numpy(), before, after, layer, threshold, later, num_registers)


def _view(model: nn.Module, images: Float[Tensor, "1 3 s s"], layer: int, later: tuple[int, ...]) -> View:
    found, layout = run_forward(model, images, later), TokenLayout.of(model)
    norms, features = found.norms[layer, 0].cpu().numpy(), layout.patches(found.tokens)[0].float().cpu().numpy()
    if found.attention is None:
        return View(norms, None, None, features)
    row = found.attention[..., None]  # (1, n, 1)
    return View(
        norms, layout.patches(row)[0, :, 0].cpu().numpy(), float(layout.test_time_registers(row).sum()), features
    )


def feature_colours(look: Look) -> list[Float[np.ndarray, "p 3"]]:
    """Red, green and blue (0 to 1) of each patch, of `before` and, if there is one, `after`; one palette for both."""
    views = [look.before] if look.after is None else [look.before, look.after]
    normal = ~look.outliers if (~look.outliers).any() else np.ones_like(look.outliers)
    palette = fit_palette(np.concatenate([view.features[normal] for view in views]))
    return [palette.paint(view.features) for view in views]


def draw_look(path: Path, look: Look, title: str) -> None:
    """Writes the PNG: the image and the figures on top; below, norms, attention and features.

    Where there is a view with registers, it stands right of the one without; otherwise the maps stand two by two.

    Args:
        title: a short line over the picture.
    """
    maps = _maps(look)
    if look.after is None:
        singles = [row[0] for row in maps]
        maps = [singles[i : i + 2] for i in range(0, len(singles), 2)]
    figure = Figure(figsize=(WIDTH, HEAD + (1 + len(maps)) * ROW), layout="constrained", facecolor="white")
    figure.suptitle(title, x=0.02, ha="left", fontsize=16, fontweight="bold", color=INK)
    figure.get_layout_engine().set(h_pad=0.12)
    panels = figure.subplots(1 + len(maps), 2)
    for axes in panels.flat:
        axes.set_axis_off()
    _show(panels[0, 0], look, {"X": look.image})
    _write_figures(panels[0, 1], look)
    for row, parts in zip(panels[1:], maps, strict=True):
        for axes, part in zip(row, parts, strict=False):
            axes.set_title(f"{part.name}\n", loc="left", fontsize=14.5, fontweight="bold", color=INK)
            axes.text(0, 1.03, part.caption, transform=axes.transAxes, fontsize=11, color=PALE)
            _show(axes, look, part.panel)
    write_picture(path, figure, DPI)


@dataclass(frozen=True)
class _Map:
    """One map: its heading ("" under that of its left neighbour), caption, and what `imshow` gets."""

    name: str
    caption: str
    panel: dict


def _maps(look: Look) -> list[list[_Map]]:
    """Norms, attention where there is CLS, and features; before and after side by side, on one scale."""
    views = [look.before] if look.after is None else [look.before, look.after]
    side, normal = round(look.outliers.size**0.5), ~look.outliers

    def row(name: str, captions: list[str], values: list[np.ndarray], **scale: object) -> list[_Map]:
        if len(views) == 2:
            captions = [": ".join(filter(None, pair)) for pair in zip(("before", "after"), captions, strict=True)]
        panels = [{"X": value.reshape(side, side, *value.shape[1:]), **scale} for value in values]
        return [_Map(*part) for part in zip((name, "")[: len(views)], captions, panels, strict=True)]

    threshold = np.inf if look.threshold is None else look.threshold
    least, most = normal_range((view.norms for view in views), threshold)
    captions = [f"{short(least)} to {short(most)}+, largest {short(view.norms.max())}" for view in views]
    rows = [row("Patch norms", captions, [norm_colours(view.norms, least, most, threshold) for view in views])]
    if look.before.attention is not None:
        # The scale ends where the patches that are no outliers end: they are what one wants to see.
        brightest = max(float(view.attention[normal].max(initial=0)) for view in views)
        captions = [f"up to {view.attention.max():.1%} a patch" for view in views]
        if len(views) == 2:
            captions[1] = f"{look.after.on_registers:.1%} on the register{'s' if look.num_registers > 1 else ''}"
        scale = {"cmap": "viridis", "vmin": 0, "vmax": brightest or 1.0}
        rows.append(row("CLS attention", captions, [view.attention for view in views], **scale))
    rows.append(row("Features as colours (PCA)", ["", "the same colours"][: len(views)], feature_colours(look)))
    return rows


def _show(axes: Axes, look: Look, panel: dict) -> None:
    """A map with a frame around each patch that is an outlier in the untreated model."""
    axes.imshow(**panel, interpolation="nearest", extent=(0, 1, 1, 0))
    side = round(look.outliers.size**0.5)
    frame = {"fill": False, "edgecolor": OUTLIER, "linewidth": 1.2, "clip_on": False}
    for row, column in np.argwhere(look.outliers.reshape(side, side)):
        axes.add_patch(Rectangle((column / side, row / side), 1 / side, 1 / side, **frame))


def _write_figures(axes: Axes, look: Look) -> None:
    """The numbers beside the image: large what counts, small what it is."""
    n, total, after = int(look.outliers.sum()), look.outliers.size, _registers(look.num_registers)
    lines = [(f"{n} of {total}" if n else "No outliers", 25, INK)]
    lines.append(("patches are outliers" if n else f"among {total} patches", 12.5, INK))
    if n and look.after is not None:
        lines.append((f"{int(look.over(look.after).sum())} with {after}", 12.5, INK))
    if n and look.before.attention is not None:
        lines += [("", 12.5, INK), (f"{look.attention_on_outliers(look.before):.0%}", 25, INK)]
        lines.append(("of CLS attention on them", 12.5, INK))
        if look.after is not None:
            lines.append((f"{look.attention_on_outliers(look.after):.1%} with {after}", 12.5, INK))
    lines += [("", 12.5, INK), (f"norms: after block {look.layer}", 11, PALE)]
    if look.threshold is not None:
        lines.append((f"outlier: norm over {short(look.threshold)}, framed", 11, PALE))
    if look.before.attention is not None:
        lines.append((f"attention: blocks {look.later[0]} to {look.later[-1]}", 11, PALE))
    y = 1.0
    for text, size, color in lines:
        axes.text(0.03, y, text, fontsize=size, color=color, va="top", fontweight="bold" if size > 20 else None)
        y -= size / 150


def _registers(count: int) -> str:
    return "1 register" if count == 1 else f"{count} registers"
