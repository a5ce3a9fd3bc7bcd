"""verify@<run>: what a run leaves of the outliers, and how far it is from the model before planting;
metrics/runs/<run>/verify/. It has forwards of its own, as it needs the unplanted model."""

from pathlib import Path

from regvit.data.batches import Batches
from regvit.data.manifest import read_dataset
from regvit.features.dense_set import drawn_images
from regvit.measures import verification
from regvit.measures.diagnosis import diagnose_run, searched_in
from regvit.measures.forward_cost import cost_figures
from regvit.measures.identification import moved_figures, moved_table
from regvit.measures.tables import write_results
from regvit.pipeline.command import command, noted
from regvit.pipeline.params import load_params
from regvit.pipeline.runtime import Runtime
from regvit.registers.neurons_file import read_neurons
from regvit.registers.run_files import read_run
from regvit.stats.figures import write_csv

PICTURES = 6


def main(name: str) -> None:
    params, runtime = load_params(), Runtime.load()
    out, seed, run_file = Path("metrics/runs") / name / "verify", params.seed, Path(f"features/runs/{name}.json")
    models = verification.open_models(run_file, Path("data/backbones"), Path("features/neurons"), runtime.device)
    images = read_dataset(Path("data") / params.in_distribution).subset("test")
    images = drawn_images(images, params.verify.images, seed)
    label = f"verify {name}"
    batches = Batches(images, models.run.transform, runtime.batch_size, runtime.workers, runtime.device, label)
    found = verification.verify(models, batches)
    run, searched = read_run(run_file), read_neurons(Path(f"features/neurons/{models.run.name}.json").read_text())
    shown = [
        *verification.figures(found, seed),
        *moved_figures(run, searched),
        *cost_figures(models.run, models.untreated),
    ]
    write_csv(out / "neurons.csv", moved_table(run, searched))
    write_results(out, name, params.in_distribution, shown, images.rows.column("image_id"), found.images)
    write_csv(out / "norms.csv", verification.norm_table(found))
    seen = searched_in(searched, found.images["untreated_outlier_fraction"])
    with noted(f"{name}: not diagnosed, as"):
        print(f"{name}: {diagnose_run(out, name, models.run.model, models.untreated.model, batches, seen)}")
    scenes = read_dataset(Path("data") / params.verify.pictures).subset("test")
    verification.draw_verification(out, name, models, scenes, PICTURES)
    print(f"{name}: " + ", ".join(f"{one.metric} {one.value:.4g}" for one in shown if one.value is not None))


if __name__ == "__main__":
    command(main, "run", interrupted="metrics/runs/{0}/verify is not finished")
