"""One image seen through a backbone, before and after test-time registers: norms, CLS attention, features as colours.

One palette (`feature_colours`) paints both columns. It is fitted on the patches of both that are no outliers in the
untreated model.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from jaxtyping import Bool, Float, UInt8
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from torch import Tensor, nn

from regvit.files import replacing
from regvit.measures.feature_colours import fit_palette
from regvit.measures.gallery import OUTLIER, norm_colours, normal_range, short
from regvit.models.attention import watch_prefix_attention
from regvit.models.hooks import blocks, watch_outputs
from regvit.models.tokens import TokenLayout
from regvit.registers.outliers import Detection
from regvit.registers.test_time import add_test_time_registers

INK, PALE = "#1b1f24", "#6a737d"  # text, lesser text
DPI = 160
MARGIN, GAP, SIDE = 0.2, 0.14, 2.93  # inches: border, between columns, of a map; 1,024 pixels wide, as a phone is
HEADER, BAND = 0.46, 0.74  # inches: over the image, over each row of maps


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


@torch.inference_mode()
def _view(model: nn.Module, images: Float[Tensor, "1 3 s s"], layer: int, later: tuple[int, ...]) -> View:
    layout, norms = TokenLayout.of(model), []
    see = {layer: blocks(model)[layer]}
    with watch_outputs(see, lambda _, x: norms.append(layout.patches(x)[0].float().norm(dim=-1).cpu().numpy())):
        if layout.cls:
            with watch_prefix_attention(model, list(later)) as seen:
                tokens = model.forward_features(images)
            row = torch.stack([seen[at][0, :, 0].mean(0) for at in later]).mean(0)[None, :, None]  # (1, n, 1)
            attention = layout.patches(row)[0, :, 0].cpu().numpy()
            on_registers = float(layout.test_time_registers(row).sum())
        else:
            tokens, attention, on_registers = model.forward_features(images), None, None
    return View(norms[0], attention, on_registers, layout.patches(tokens)[0].float().cpu().numpy())


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
    sheet = _Sheet(len(maps))
    sheet.write(MARGIN, sheet.y - 0.02, title, size=16, weight="bold", va="top")
    sheet.down(HEADER)
    _show(sheet.panel(0), look, {"X": look.image})
    _write_figures(sheet, look)
    sheet.down(SIDE)
    for row in maps:
        sheet.down(BAND)
        for column, part in enumerate(row):
            sheet.write(sheet.left(column), sheet.y + 0.36, part.name, size=14.5, weight="bold")
            sheet.write(sheet.left(column), sheet.y + 0.09, part.caption, size=12, color=PALE)
            _show(sheet.panel(column), look, part.panel)
            if part.bar is not None:
                _colour_bar(sheet, *part.bar, look.threshold)
        sheet.down(SIDE)
    path.parent.mkdir(parents=True, exist_ok=True)
    with replacing(path) as beside:
        sheet.figure.savefig(beside, dpi=DPI, metadata={"Software": None})


@dataclass(frozen=True)
class _Map:
    """One map: its heading ("" under that of its left neighbour), caption, and what `imshow` gets; `bar` has the ends
    of a colour bar that stands over the right column."""

    name: str
    caption: str
    panel: dict
    bar: tuple[float, float] | None = None


def _maps(look: Look) -> list[list[_Map]]:
    """Norms, attention where there is CLS, and features; before and after side by side, on one scale."""
    views = [look.before] if look.after is None else [look.before, look.after]
    side, normal = round(look.outliers.size**0.5), ~look.outliers

    def row(name: str, captions: list[str], values: list[np.ndarray], bar: tuple | None = None, **scale) -> list[_Map]:
        if len(views) == 2:
            captions = [": ".join(filter(None, pair)) for pair in zip(("before", "after"), captions, strict=True)]
        panels = [{"X": value.reshape(side, side, *value.shape[1:]), **scale} for value in values]
        parts = zip((name, "")[: len(views)], captions, panels, (None, bar)[: len(views)], strict=True)
        return [_Map(*part) for part in parts]

    threshold = np.inf if look.threshold is None else look.threshold
    ends = normal_range((view.norms for view in views), threshold)
    largest = [f"largest {short(view.norms.max())}, median {short(np.median(view.norms))}" for view in views]
    if len(views) == 1:  # no room for the colour bar
        largest = [f"{short(ends[0])} to {short(ends[1])}+, largest {short(look.before.norms.max())}"]
    colours = [norm_colours(view.norms, *ends, threshold) for view in views]
    rows = [row("Patch norms", largest, colours, bar=ends)]
    if look.before.attention is not None:
        # The scale ends where the patches that are no outliers end: they are what one wants to see.
        most = max(float(view.attention[normal].max(initial=0)) for view in views)
        shares = [f"up to {view.attention.max():.1%} a patch" for view in views]
        if len(views) == 2:
            shares[1] = f"{look.after.on_registers:.1%} on the register{'s' if look.num_registers > 1 else ''}"
        attention = [view.attention for view in views]
        rows.append(row("CLS attention", shares, attention, cmap="viridis", vmin=0, vmax=most or 1.0))
    rows.append(row("Features as colours (PCA)", ["", "the same colours"][: len(views)], feature_colours(look)))
    return rows


class _Sheet:
    """A figure measured in inches from its upper left corner, filled row by row."""

    def __init__(self, rows: int):
        self.height = 2 * MARGIN + HEADER + SIDE + rows * (BAND + SIDE)
        self.width = 2 * MARGIN + 2 * SIDE + GAP
        self.figure = Figure(figsize=(self.width, self.height), facecolor="white")
        self.y = self.height - MARGIN  # from the bottom, where the next row begins

    def down(self, inches: float) -> None:
        """Goes on further down."""
        self.y -= inches

    def left(self, column: int) -> float:
        """Where a column begins."""
        return MARGIN + column * (SIDE + GAP)

    def panel(self, column: int) -> Axes:
        """Axes for a square map under the current place."""
        return self.axes(self.left(column), self.y - SIDE, SIDE, SIDE)

    def axes(self, x: float, y: float, width: float, height: float) -> Axes:
        """Axes at a place in inches."""
        return self.figure.add_axes((x / self.width, y / self.height, width / self.width, height / self.height))

    def write(self, x: float, y: float, text: str, size: float, color: str = INK, **style: object) -> None:
        """A line of text whose lower left corner is at a place in inches."""
        self.figure.text(x / self.width, y / self.height, text, fontsize=size, color=color, **style)


def _show(axes: Axes, look: Look, panel: dict) -> None:
    """A map with a frame around each patch that is an outlier in the untreated model."""
    axes.imshow(**panel, interpolation="nearest", extent=(0, 1, 1, 0))
    axes.set_axis_off()
    side = round(look.outliers.size**0.5)
    for row, column in np.argwhere(look.outliers.reshape(side, side)):
        axes.add_patch(
            Rectangle(
                (column / side, row / side),
                1 / side,
                1 / side,
                fill=False,
                edgecolor=OUTLIER,
                linewidth=1.2,
                clip_on=False,
            )
        )


def _write_figures(sheet: _Sheet, look: Look) -> None:
    """The numbers beside the image: large what counts, small what it is."""
    n, total, x, y = int(look.outliers.sum()), look.outliers.size, sheet.left(1), sheet.y
    after = _registers(look.num_registers)
    figures = [
        (f"{n} of {total}" if n else "No outliers", ["patches are outliers"] if n else [f"among {total} patches"])
    ]
    if n and look.after is not None:
        figures[0][1].append(f"{int(look.over(look.after).sum())} with {after}")
    if n and look.before.attention is not None:
        text = ["of CLS attention on them"]
        if look.after is not None:
            text.append(f"{look.attention_on_outliers(look.after):.1%} with {after}")
        figures.append((f"{look.attention_on_outliers(look.before):.0%}", text))
    y -= 0.42
    for large, small in figures:
        sheet.write(x + 0.1, y, large, size=25, weight="bold")
        for line in small:
            y -= 0.25
            sheet.write(x + 0.1, y, line, size=12.5)
        y -= 0.66
    notes = [f"norms: after block {look.layer}"]
    notes += [f"outlier: norm over {short(look.threshold)}"] if look.threshold is not None else []
    notes += [f"attention: blocks {look.later[0]} to {look.later[-1]}"] if look.before.attention is not None else []
    for i, note in enumerate(reversed(notes)):
        sheet.write(x + 0.1, sheet.y - SIDE + 0.03 + 0.21 * i, note, size=11, color=PALE)


def _colour_bar(sheet: _Sheet, least: float, most: float, threshold: float | None) -> None:
    """A slim bar at the right end of the row's heading, and right of it the colour of norms over the threshold."""
    length, box, y = 0.7, 0.15, sheet.y + 0.37
    x = sheet.left(1) + 0.42
    axes = sheet.axes(x, y + 0.005, length, 0.13)
    axes.imshow(np.linspace(0, 1, 256)[None], cmap="magma", aspect="auto")
    axes.set_axis_off()
    sheet.write(x - 0.06, y, short(least), size=11, color=PALE, ha="right")
    sheet.write(x + length + 0.06, y, f"{short(most)}+", size=11, color=PALE)
    if threshold is None:
        return
    x += length + 0.62
    axes = sheet.axes(x, y - 0.005, box, box)
    axes.add_patch(Rectangle((0, 0), 1, 1, color=OUTLIER))
    axes.set_axis_off()
    sheet.write(x + box + 0.07, y, f"over {short(threshold)}", size=11, color=PALE)


def _registers(count: int) -> str:
    return "1 register" if count == 1 else f"{count} registers"
