"""evaluate@<run>: the run's classifiers and detectors on the test images of every data set."""

from pathlib import Path

from tqdm.auto import tqdm

from regvit.data.manifest import read_dataset
from regvit.features.store import FeatureStore
from regvit.files import write_text
from regvit.measures.detectors import Detectors
from regvit.measures.evaluation import confusion_table, evaluate, roc_table
from regvit.measures.prediction import Measured, predict
from regvit.pipeline.command import command
from regvit.pipeline.params import load_params
from regvit.pipeline.runtime import Runtime
from regvit.probing.probes import load_baselines, load_probes
from regvit.stats.figures import write_figures


def main(run: str) -> None:
    params, runtime = load_params(), Runtime.load()
    settings, sets = params.evaluate, {}
    for name, entry in params.datasets.items():
        dataset = read_dataset(Path("data") / name)
        store = FeatureStore.open(f"features/{run}/{name}.zarr", dataset.digest)
        sets[name] = Measured(dataset, entry.role, store)
    probes = load_probes(f"features/probes/{run}.safetensors")
    baselines = load_baselines(f"features/baselines/{run}.safetensors")
    detectors = Detectors(settings.detectors, settings.shrinkage, runtime.device)
    with tqdm(total=len(probes.probes), desc=f"evaluate {run}", unit="readout") as bar:
        predictions = predict(
            run, probes, baselines, sets, detectors, f"features/predictions/{run}.zarr", lambda _: bar.update()
        )
    figures, out = evaluate(predictions, settings.bootstrap, params.seed), Path("metrics/runs") / run / "evaluate"
    write_figures(out / "figures.csv", figures)
    write_text(out / "roc.csv", roc_table(predictions).to_csv(index=False))
    write_text(out / "confusion.csv", confusion_table(predictions).to_csv(index=False))
    top1 = figures.query("metric == 'top1' and classifier == 'linear'").pivot_table(
        "value", "readout", "dataset", sort=False
    )
    print(f"{run}, top-1 of the linear probes:\n{top1.to_string(float_format='{:.4f}'.format)}")


if __name__ == "__main__":
    command(main, "run", interrupted="features/predictions/{0}.zarr is not finished")
