"""verify@<run>: holds a run on a planted backbone against the model before planting; metrics/verify/<run>.json, .png."""

import json
import sys
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from params import load_params
from regvit.backbones import Backbone, load_backbone, unplanted
from regvit.batches import Batches
from regvit.gallery import draw_maps, token_maps
from regvit.intervals import mean_with_interval
from regvit.manifest import read_dataset
from regvit.neurons import read_selected
from regvit.outliers import Detection, patch_norms
from regvit.runs import open_run
from regvit.verification import compare_with_intact
from runtime import Runtime

PICTURES = 4


def main(name: str) -> None:
    params, runtime = load_params(), Runtime.load()
    out = Path(f"metrics/verify/{name}.json")
    out.parent.mkdir(parents=True, exist_ok=True)
    models = open_models(name, params, runtime)
    metrics = verify(name, params, runtime, models)
    out.write_text(json.dumps(metrics, indent=1) + "\n")
    draw(out.with_suffix(".png"), name, params, models)
    print(f"{name}: " + (", ".join(f"{k} {metrics[k]:.4g}" for k in metrics if f"{k}_lo" in metrics) or metrics["why"]))


@dataclass(frozen=True)
class Models:
    """The backbone before planting (or as it came), planted and untreated, and as the run has it."""

    intact: Backbone
    untreated: Backbone
    run: Backbone
    detection: Detection | None
    later: list[int]  # blocks after the last register neuron, where outliers draw attention


def open_models(name: str, params: dict, runtime: Runtime) -> Models:
    """All on the device; without ground truth, `intact` and `untreated` are the same backbone."""
    folder = Path("data/backbones") / params["runs"][name]["backbone"]
    untreated = load_backbone(folder)
    intact = unplanted(folder) if untreated.planted else untreated
    run = open_run(Path("features") / name / "run.json", Path("data/backbones"))
    for backbone in (intact, untreated, run):
        backbone.model.to(runtime.device)
    detection, selected = read_selected(Path(f"features/neurons/{untreated.name}.json").read_text())
    depth = len(run.model.blocks)
    first = max(selected) + 1 if selected else depth // 2
    return Models(intact, untreated, run, detection, list(range(min(first, depth - 1), depth)))


def verify(name: str, params: dict, runtime: Runtime, models: Models) -> dict:
    """Compares on the held-out test images; a run whose backbone was not planted has no ground truth."""
    if not models.untreated.planted:
        return {"planted": False, "why": "the backbone is as it came: there is no ground truth to compare with"}
    if models.detection is None:
        return {"planted": True, "why": "the search found no outliers in the planted backbone"}
    images = read_dataset(Path("data") / params["in_distribution"]).subset("test")
    batches = Batches(
        images, models.run.transform, runtime.batch_size, runtime.workers, runtime.device, f"verify {name}"
    )
    norms = patch_norms(models.untreated.model, batches, [models.detection.layer])[0]
    outliers = norms > models.detection.threshold
    recovery = compare_with_intact(
        models.run.model, models.intact.model, outliers, models.detection, batches, models.later
    )
    metrics = {"planted": True, "images": len(images), "images_with_outliers": int(outliers.any(1).sum())}
    for field, values in vars(recovery).items():
        metrics |= mean_with_interval(field, values, params["seed"])
    return metrics


def draw(path: Path, name: str, params: dict, models: Models) -> None:
    """The first held-out images of the set for pictures, at twice the run's image size where the model takes it, so that objects show."""
    transform = models.run.transform
    if getattr(models.run.model, "dynamic_img_size", False):
        transform = replace(transform, size=2 * transform.size)
    scenes = read_dataset(Path("data") / params["verify"]["pictures"]).subset("test")
    pixels = torch.stack([transform.load(scenes.image_path(i)) for i in range(min(PICTURES, len(scenes)))])
    device = next(models.run.model.parameters()).device
    columns = {"intact": models.intact} if models.untreated.planted else {}
    if getattr(models.run.model, "test_time_registers", None) is not None:
        columns["original"] = models.untreated
    columns[name] = models.run
    layer = len(models.run.model.blocks) - 2 if models.detection is None else models.detection.layer
    maps = {
        title: token_maps(backbone.model, transform.normalise(pixels.to(device)), layer, models.later)
        for title, backbone in columns.items()
    }
    ceiling = max(m.norms.max() for m in maps.values()) if models.detection is None else models.detection.threshold
    draw_maps(path, pixels.permute(0, 2, 3, 1).numpy() / 255, maps, float(ceiling))


if __name__ == "__main__":
    main(*sys.argv[1:])
