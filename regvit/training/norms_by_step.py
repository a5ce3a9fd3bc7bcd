"""Norms while a model trains: when do outliers appear? (Darcet et al. 2024, arXiv:2309.16588, figure 4b.)"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np
import pandas as pd
from jaxtyping import Float
from matplotlib.figure import Figure as Picture
from torch import Tensor, nn

from regvit.files import write_picture
from regvit.registers.outliers import detect, patch_norms

IMAGES = 128  # of the val split, at most
NORM_COLUMNS = ("step", "layer", "median", "q99", "max", "over_threshold")
CURVE_COLUMNS = ("step", "loss", "val_top1")


def norm_rows(model: nn.Module, batches: Iterable[Float[Tensor, "b 3 s s"]], step: int) -> list[tuple]:
    """A row a block: quantiles of the patch norms at its output, and in the detection layer, if there are outliers now,
    the share of patches over the threshold that is found now; `NORM_COLUMNS`."""
    norms = patch_norms(model, batches)
    found, rows = detect(norms), []
    for layer, of_layer in enumerate(norms):
        over = float((of_layer > found.threshold).mean()) if found and found.layer == layer else float("nan")
        rows.append((step, layer, *np.quantile(of_layer, (0.5, 0.99, 1)).tolist(), over))
    return rows


def draw_training(path: Path, title: str, curve: Sequence[tuple], norms: Sequence[tuple]) -> None:
    """A PNG: loss and validation accuracy; and, where norms were looked at, the largest norm over the median by block, a
    line a checkpoint."""
    picture = Picture(figsize=(9, 3.2), layout="constrained")
    picture.suptitle(title, fontsize=10)
    left, right = picture.subplots(1, 2)
    table = pd.DataFrame(curve, columns=CURVE_COLUMNS)
    left.plot(table.step, table.loss, color="tab:gray", label="loss")
    left.set(xlabel="step", ylabel="training loss")
    accuracy = left.twinx()
    accuracy.plot(table.step, table.val_top1, color="tab:blue")
    accuracy.set_ylabel("validation top-1", color="tab:blue")
    for step, rows in pd.DataFrame(norms, columns=NORM_COLUMNS).groupby("step"):
        right.plot(rows.layer, rows["max"] / rows["median"], label=f"step {step}")
    right.set(xlabel="block", ylabel="largest norm / median", yscale="log")
    if norms:
        right.legend(fontsize=7)
    write_picture(path, picture, 80)
