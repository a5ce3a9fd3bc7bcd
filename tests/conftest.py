"""Small real models and images for the whole suite; nothing here needs a network or a GPU."""

import os
import time
from collections.abc import Callable, Iterator

# Before torch is imported: a process of tests for each core, and none waits for the threads of another.
os.environ.setdefault("OMP_NUM_THREADS", "1")

import hub_server  # before what reads where the hub is
import pytest
import torch
from timm.models.vision_transformer import VisionTransformer

# Files that take longest: begun first, so that in the end no process works alone.
LONG = (
    "test_caching",
    "test_every_choice",
    "test_docs_commands",
    "test_trust_kills",
    "test_ray_engine",
    "test_stages_extract",
)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    order = {name: place for place, name in enumerate(LONG)}
    items.sort(key=lambda item: order.get(item.path.stem, len(LONG)))


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line("markers", "network: may fetch a package once, through the package client")
    # Ray has its workers yield to all others (15): on a busy machine these tests would wait for them for many minutes.
    os.environ.setdefault("RAY_worker_niceness", "0")


@pytest.fixture(scope="session")
def tiny_vit() -> Callable[..., VisionTransformer]:
    """A factory of ViTs with random weights: 64 wide, 6 blocks or as many as are asked for, 4 heads, 8 x 8 patches of 8 px."""

    def make(
        seed: int = 0,
        *,
        depth: int = 6,
        cls: bool = True,
        registers: int = 0,
        layer_scale: float | None = None,
        **kwargs,
    ):
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            model = VisionTransformer(
                img_size=64,
                patch_size=8,
                embed_dim=64,
                depth=depth,
                num_heads=4,
                num_classes=0,
                init_values=layer_scale,
                class_token=cls,
                reg_tokens=registers,
                global_pool="token" if cls else "avg",
                **kwargs,
            )
        return model.eval().requires_grad_(False)

    return make


@pytest.fixture(scope="session")
def noise_images() -> Callable[..., torch.Tensor]:
    """A factory of (count, 3, 64, 64) noise, each image with one flat bright square of three patches a side."""

    def make(count: int, seed: int = 0) -> torch.Tensor:
        generator = torch.Generator().manual_seed(seed)
        images = torch.randn(count, 3, 64, 64, generator=generator)
        corners = torch.randint(0, 6, (count, 2), generator=generator) * 8
        for image, (row, column) in zip(images, corners.tolist(), strict=True):
            image[:, row : row + 24, column : column + 24] = 2.0
        return images

    return make


@pytest.fixture
def hub(monkeypatch) -> Iterator[hub_server.Hub]:
    """The hub that clients ask, empty; they try again without waiting."""
    monkeypatch.setattr(time, "sleep", lambda _: None)
    with hub_server.serving() as served:
        yield served
