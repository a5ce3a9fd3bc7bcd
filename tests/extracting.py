"""What the tests of extraction share: a tiny model, eleven images of noise, and ways to be interrupted."""

import io
import pickle

import numpy as np
import timm
import torch
from PIL import Image

from regvit.data.decoding import Transform
from regvit.data.manifest import Row, read_dataset, write_dataset
from regvit.data.progress import progress
from regvit.features.extraction import describe, extract
from regvit.features.store import FeatureStore
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


def noise(root):
    """Eleven images whose names are in another order than their rows."""
    folder = root / "noise"
    (folder / "images").mkdir(parents=True)
    rows = []
    for i in range(11):
        name = f"{(7 * i) % 11:02}"
        Image.fromarray(image_of(i)).save(folder / f"images/{name}.png")
        rows.append(Row(f"id {name}", f"images/{name}.png", "noise", "train"))
    write_dataset(folder, "noise", rows, ["noise"], {"source": "made for this test"})
    return read_dataset(folder)


def run(folder, backbone, dataset, precision="float32", **options):
    """Extracts in units of four rows and opens the result."""
    options = {"batch_size": 4, "rows_per_unit": 4} | options
    final = folder / "noise.zarr"
    attributes = describe(backbone, dataset, precision) | {"run": "original"}
    extract(backbone, dataset, final, folder / "noise.partial", attributes, precision, **options)
    return FeatureStore.open(final, dataset.digest, [row.image_id for row in dataset.rows])


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


class Interrupting(progress):
    """Ctrl-C after some images."""

    def __init__(self, after):
        self.log = io.StringIO()
        super().__init__(11, "extract", stream=self.log)
        self.after = after

    def advance(self, n=1):
        super().advance(n)
        if self.done >= self.after:
            raise KeyboardInterrupt


class Backwards:
    """An engine that computes the last unit first, each with an extractor of its own, as workers do."""

    def fill(self, make, writer, advance):
        for unit in reversed(writer.missing_units()):
            start, stop = writer.unit_rows(unit)
            writer.write(unit, pickle.loads(pickle.dumps(make))(device="cpu").unit(start, stop))
            advance(stop - start)


class Compiled:
    """In place of torch.compile: counts calls, and gives what the model gives, or fails as a missing compiler does."""

    def __init__(self, fails=False):
        self.fails, self.seen = fails, []

    def __call__(self, forward, dynamic):
        def compiled(images):
            if self.fails:
                raise torch._dynamo.exc.BackendCompilerFailed(None, RuntimeError("no C++ compiler"), None)
            self.seen.append(len(images))
            return forward(images)

        assert dynamic is False
        return compiled
