"""The images that a command is given: files, and folders of them, decoded once."""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from regvit.cli.errors import WrongInput, in_words

if TYPE_CHECKING:
    import torch
    from jaxtyping import Float, UInt8
    from torch import Tensor

    from regvit.data.transform import Transform

BATCH = 32  # images a forward pass
SEED = 0  # of the draw from more images than are wanted


@dataclass(frozen=True)
class DecodedImages:
    """Normalised batches that can be gone through more than once; uint8 in memory, 150 kB an image of 224 pixels."""

    pixels: UInt8[Tensor, "b 3 s s"]
    transform: Transform
    device: torch.device

    def __len__(self) -> int:
        return len(self.pixels)

    def __iter__(self) -> Iterator[Float[Tensor, "b 3 s s"]]:
        for batch in self.pixels.split(BATCH):
            yield self.transform.normalise(batch.to(self.device))

    def select(self, rows: Sequence[int]) -> DecodedImages:
        """Some of the images, by their numbers, in that order."""
        return replace(self, pixels=self.pixels[list(rows)])


def image_files(paths: Iterable[Path], limit: int) -> list[Path]:
    """The files, and those in the folders that can be images, each once, in random order (folders may be sorted) and at most
    `limit`; what else lies there is counted on stderr."""
    import numpy as np  # why here and not above: see __init__

    from regvit.data.sources.folder import survey

    files: dict[Path, None] = {}
    others: Counter[str] = Counter()
    for path in paths:
        if path.is_dir():
            below = survey(path)
            files |= dict.fromkeys(path / name for name in below.images)
            others += below.others
        elif path.is_file():
            files[path] = None
        else:
            raise WrongInput(f"{path} is neither a file nor a folder; give images, or folders of them")
    if others:
        kinds = ", ".join(f"{suffix} {count}" for suffix, count in others.most_common())
        print(f"left out: {others.total()} files are no images by their name ({kinds})", file=sys.stderr)
    if not files:
        raise WrongInput(
            f"{', '.join(map(str, paths))} holds no file with the suffix of an image format (.png, .jpg, …)"
        )
    found = list(files)
    return [found[i] for i in np.random.default_rng(SEED).permutation(len(found))[:limit]]


def decode(files: Sequence[Path], transform: Transform) -> tuple[UInt8[Tensor, "b 3 s s"], int]:
    """The images that can be read, and the number of the others, which are named on stderr with the reason."""
    import torch  # why here and not above: see __init__
    from tqdm.auto import tqdm

    from regvit.data.decoding import UnreadableImage

    def load(file: Path) -> Tensor | str:
        try:
            return transform.load(file)
        except UnreadableImage as error:
            return f"left out: {in_words(error)}"

    with ThreadPoolExecutor() as threads:
        loaded = list(tqdm(threads.map(load, files), "reading images", len(files), leave=False))
    faults = [one for one in loaded if isinstance(one, str)]
    print(*faults, sep="\n", end="\n" if faults else "", file=sys.stderr)
    if len(faults) == len(files):
        raise WrongInput(f"none of the {len(files)} images can be read")
    return torch.stack([one for one in loaded if not isinstance(one, str)]), len(faults)
