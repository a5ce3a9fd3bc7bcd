"""verify@<run>: holds a run on a planted backbone against the model before planting; metrics/verify/<run>.json,
.png and a folder of the same name with the parts of the picture and images.csv, a row an image."""

from pathlib import Path

from regvit.data.batches import Batches
from regvit.data.manifest import read_dataset
from regvit.files import write_json
from regvit.measures.verification import draw_verification, open_models, verify, write_images
from regvit.pipeline.command import command
from regvit.pipeline.params import load_params
from regvit.pipeline.runtime import Runtime

PICTURES = 6


def main(name: str) -> None:
    params, runtime = load_params(), Runtime.load()
    out = Path(f"metrics/verify/{name}.json")
    out.parent.mkdir(parents=True, exist_ok=True)
    run_file = Path(f"features/runs/{name}.json")
    models = open_models(run_file, Path("data/backbones"), Path("features/neurons"), runtime.device)
    images = read_dataset(Path("data") / params["in_distribution"]).subset("test")
    batches = Batches(
        images, models.run.transform, runtime.batch_size, runtime.workers, runtime.device, f"verify {name}"
    )
    found = verify(models, batches, params["seed"])
    metrics = found.metrics
    write_json(out, metrics)
    scenes = read_dataset(Path("data") / params["verify"]["pictures"]).subset("test")
    draw_verification(out.with_suffix(".png"), name, models, scenes, PICTURES)
    write_images(out.with_suffix("") / "images.csv", images.rows.column("image_id"), found.images)
    print(f"{name}: " + (", ".join(f"{k} {metrics[k]:.4g}" for k in metrics if f"{k}_lo" in metrics) or metrics["why"]))


if __name__ == "__main__":
    command(main, "run", interrupted="metrics/verify/{0}.json is not finished")
