"""What the tests of extraction share: a tiny model, eleven images of noise, and ways to be interrupted."""

import pickle

import numpy as np
import timm
import torch
from PIL import Image

from regvit.data.manifest import Row, read_dataset, write_dataset
from regvit.data.transform import Transform
from regvit.features.extraction import Options, fill_store
from regvit.features.forward import ARRAYS, Forward, Readouts
from regvit.models.backbones import Backbone
from regvit.registers.test_time import add_test_time_registers

SIZE = 32


def backbone_of(name="test_vit", **changes):
    """A timm model of random weights that sees 32 px images."""
    torch.manual_seed(0)
    model = (
        timm.create_model(name, pretrained=False, img_size=SIZE, num_classes=0, **changes).eval().requires_grad_(False)
    )
    transform = Transform(SIZE, mean=(0.5, 0.5, 0.5), std=(0.5, 0.5, 0.5))
    return Backbone(
        name=name, model=model, transform=transform, weights_sha256="w" * 64, planted=None, info={"architecture": name}
    )


def image_of(row):
    """An image whose content encodes its row: noise of that seed."""
    return np.random.default_rng(row).integers(0, 256, (SIZE, SIZE, 3), dtype=np.uint8)


def noise(root, count=11):
    """Images (eleven of them) whose names are in another order than their rows."""
    folder = root / "noise"
    (folder / "images").mkdir(parents=True)
    rows = []
    for i in range(count):
        name = f"{(7 * i) % count:02}"
        Image.fromarray(image_of(i)).save(folder / f"images/{name}.png")
        rows.append(Row(f"id {name}", f"images/{name}.png", "noise", "train"))
    write_dataset(folder, "noise", rows, ["noise"], {"source": "made for this test"})
    return read_dataset(folder)


def run(folder, backbone, dataset, precision="float32", arrays=ARRAYS, **options):
    """Extracts in units of four rows."""
    options = Options(**{"batch_size": 4} | options)
    forward = Forward(backbone, Readouts(tuple(arrays)), precision)
    return fill_store(folder / "noise.zarr", dataset, forward, {"run": "original"}, options, rows_per_unit=4)


def tokens_of(backbone, row):
    """What the model says of one image alone, worked without the loader: (1, n, d)."""
    image = torch.from_numpy(image_of(row)).permute(2, 0, 1)[None].float()
    with torch.no_grad():
        return backbone.model.forward_features((image / 255 - 0.5) / 0.5)


def tree(folder):
    return {str(f.relative_to(folder)): f.read_bytes() for f in sorted(folder.rglob("*")) if f.is_file()}


def with_registers(backbone, count):
    add_test_time_registers(backbone.model, {1: [0, 5], 3: [7]}, count)
    return backbone


class Interrupting:
    """An engine that computes here, and meets Ctrl-C after some units."""

    def __init__(self, after):
        self.after = after

    def fill(self, job, writer, advance):
        for unit in writer.missing_units()[: self.after]:
            [arrays] = job.units([writer.layout.unit_rows(unit)], advance=advance)
            writer.write(unit, arrays)
        raise KeyboardInterrupt


class Backwards:
    """An engine that computes the last unit first, each with a job of its own, as workers do."""

    def fill(self, job, writer, advance):
        for unit in reversed(writer.missing_units()):
            [arrays] = pickle.loads(pickle.dumps(job)).units([writer.layout.unit_rows(unit)], advance=advance)
            writer.write(unit, arrays)
