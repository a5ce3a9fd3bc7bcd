"""What a run's cure measures on images of the ID train split: those on which register neurons are searched."""

from collections.abc import Mapping
from pathlib import Path

from regvit.data.batches import Batches, sample
from regvit.data.manifest import read_dataset
from regvit.pipeline.params import load_params
from regvit.pipeline.runtime import Runtime
from regvit.registers.runs import measured_for, open_uncured
from regvit.registers.search import SearchOptions


def measure_cure(described: Mapping) -> dict:
    """`measured` of the cure of a run that has been described without it."""
    params, runtime = load_params(), Runtime.load()
    options = SearchOptions(**params.identify.model_dump(exclude={"images", "rounds", "precision"}))
    backbone = open_uncured(described, Path("data/backbones"))
    backbone.model.to(runtime.device)
    images = sample(read_dataset(Path("data") / params.in_distribution), "train", params.identify.images, params.seed)
    label = f"compose {described['run']}"
    batches = Batches(images, backbone.transform, runtime.batch_size, runtime.workers, runtime.device, label)
    return measured_for(described, backbone, batches, options)
