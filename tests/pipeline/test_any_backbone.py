"""A backbone with outliers that nobody says were planted, from a file: every table tells its runs apart, every sweep has one."""

import itertools
import json
from pathlib import Path

import pandas as pd
import pytest
import timm
import torch
from report_example import params
from ruamel.yaml import YAML
from run_example import write_run
from safetensors.torch import save_file

from regvit.measures.identification import figures as search_figures
from regvit.measures.identification import moved_figures, norms_under_treatments
from regvit.measures.verification import figures, open_models, verify
from regvit.models.backbones import load_backbone, save_backbone
from regvit.models.sources import build
from regvit.pipeline import sweeps
from regvit.pipeline.params import faults_of
from regvit.registers.neurons import find_register_neurons
from regvit.registers.neurons_file import read_neurons
from regvit.registers.planting import plant
from regvit.registers.run_files import Variant, read_run
from regvit.report.checks import findings
from regvit.report.comparison import glance_table, measurement_table
from regvit.report.results import Results
from regvit.report.study import Study
from regvit.stats.figures import Figure, figures_table, write_figures

ROOT, SIZE, IMAGES = Path(__file__).parents[2], 128, 32
VARIANTS = {
    "none": Variant("none", 0),
    "test_time": Variant("test_time", 1),
    "empty": Variant("test_time", 1, "empty"),
    "random": Variant("test_time", 1, "random"),
    "eight": Variant("test_time", 8),
    "same": Variant("test_time", 1, patches="same"),
}


@pytest.fixture(scope="module")
def measured(tmp_path_factory, noise_images) -> tuple[Study, pd.DataFrame]:
    """The study of a planted model that was saved as a plain checkpoint, and what `identify` and `verify` measured."""
    folder = tmp_path_factory.mktemp("any")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = timm.create_model("test_vit", num_classes=0, img_size=SIZE).eval().requires_grad_(False)
    images = noise_images(2 * IMAGES).repeat_interleave(2, 2).repeat_interleave(2, 3)
    truth = plant(model, images[:IMAGES], seed_layer=1, amplifier_layer=2, fraction=0.05, edit_keys=True).neurons
    save_file(model.state_dict(), folder / "weights.safetensors")

    built = build(f"file:{folder}/weights.safetensors", "test_vit", SIZE)
    save_backbone(folder / "mine", built.model, name="mine", transform=built.transform, **built.about)
    backbone = load_backbone(folder / "mine")
    found = find_register_neurons(backbone.model, images[IMAGES:])
    assert {layer: set(units) for layer, units in found.selected.items()} == {k: set(v) for k, v in truth.items()}
    (folder / "mine.json").write_text(found.to_json())
    searched = read_neurons((folder / "mine.json").read_text())
    treated = norms_under_treatments(backbone.model, [images[IMAGES:]], found, seed=0)
    tables = {("mine", "identify"): figures_table(search_figures(found, treated, None, 0), "mine", "home")}
    for run, variant in VARIANTS.items():
        file = folder / f"runs/{run}.json"
        write_run(file, folder / "mine", variant, searched.selected, searched.detection)
        models = open_models(file, folder, folder)
        shown = [*figures(verify(models, images[:IMAGES].split(16))), *moved_figures(read_run(file), searched)]
        tables[run, "verify"] = figures_table(shown, run, "home")
    of = params()
    of["backbones"] = {"mine": {"source": f"file:{folder}/weights.safetensors", "architecture": "test_vit"}}
    of["runs"] = {
        name: {
            "backbone": "mine",
            "registers": each.registers,
            "num_registers": each.num_registers,
            "neurons": each.neurons,
        }
        for name, each in VARIANTS.items()
    }
    return Study.of(of), pd.concat([table.assign(stage=stage) for (_, stage), table in tables.items()])


def values(table: pd.DataFrame, metric: str) -> dict[str, float]:
    rows = table[table["metric"] == metric]
    return dict(zip(rows["run"], rows["value"], strict=True))


def test_figures_are_those_of_the_run_itself(measured):
    _, table = measured
    left, untreated = values(table, "outlier_fraction"), values(table, "untreated_outlier_fraction")
    assert untreated["none"] == left["none"] > 0.02 and len(set(untreated.values())) == 1
    assert left["test_time"] == left["eight"] == 0
    for run in ("empty", "random", "same"):
        assert left[run] == pytest.approx(left["none"], rel=0.15), run
    registers = values(table, "cls_attention_on_registers")
    assert "none" not in registers and registers["eight"] > registers["test_time"] > registers["empty"]
    assert values(table, "found_neurons") == {"test_time": 1, "eight": 1, "same": 1, "empty": 0, "random": 0}


def test_every_table_tells_them_apart(measured):
    study, table = measured
    results = Results.of(study, table)
    outliers = glance_table(results).frame.set_index("measure").loc["outlier patches, %"].map(str)
    assert outliers["test_time"].startswith("0.000") and outliers["none"] != outliers["test_time"] != outliers["empty"]
    verified = measurement_table(results, "verify", "home").frame.map(str)
    rows = verified.set_index("run").apply(tuple, axis=1)
    for one, other in itertools.combinations(("none", "test_time", "empty", "random", "eight", "same"), 2):
        assert rows[one] != rows[other], (one, other)
    said = "\n".join(findings(results))
    assert "so it is these neurons" in said
    for run, verdict in {
        "test_time": "gone",
        "eight": "gone",
        "empty": "still there",
        "random": "still there",
        "same": "still there",
    }.items():
        assert [line for line in said.splitlines() if line.strip().startswith(f"{run}:") and verdict in line], run


@pytest.mark.parametrize("name", sorted(path.stem for path in (ROOT / "sweeps").glob("*.yaml")))
def test_every_sweep_has_a_table_of_such_a_backbone(measured, name, tmp_path, monkeypatch):
    study, table = measured
    monkeypatch.chdir(tmp_path)
    Path("sweeps").symlink_to(ROOT / "sweeps")
    given = YAML(typ="safe", pure=True).load(ROOT / "params.yaml") | {"backbones": study.backbones, "runs": study.runs}
    Path("params.yaml").write_text(json.dumps(given))
    sweep = sweeps.read_sweep(name)
    assert list(sweep.faults()) == []
    points = sweep.points or range(1, 1 + max(map(len, sweep.vary.values())))
    done = [{"Experiment": f"{name}-{point}", "rev": "a"} for point in points]
    monkeypatch.setattr(sweeps.dvc.api, "exp_show", lambda: done)
    for stage, run in (("verify", "eight"), ("identify", "mine")):
        write_figures(tmp_path / stage, table[(table["stage"] == stage) & (table["run"] == run)].drop(columns="stage"))
    write_figures(tmp_path / "probe", figures_table([Figure("val_top1", 0.5, readout="cls")], "eight", "home"))

    def opened(path, rev):
        return (tmp_path / ("identify" if "backbones" in path else Path(path).parent.name)).open()

    monkeypatch.setattr(sweeps.dvc.api, "open", opened)
    shown = sweeps.table(sweep, sweeps.experiments(sweep))
    assert len(shown.frame) == len(points) and shown.text()
    row = shown.frame.map(str).iloc[0]
    expected = {"outlier patches, %": "0.000", "register neurons": "6", "CLS cosine": "–", "val top1 cls": "0.5"}
    seen = {column: row[column][: len(start)] for column, start in expected.items() if column in row}
    assert seen and seen.items() <= expected.items()


def test_the_sweep_of_rules_searches_such_a_backbone_by_each_of_them(measured, noise_images, monkeypatch):
    study, _ = measured
    folder = Path(study.backbones["mine"]["source"].removeprefix("file:")).parent
    model = load_backbone(folder / "mine").model
    truth = read_neurons((folder / "mine.json").read_text()).selected
    images = noise_images(2 * IMAGES)[IMAGES:].repeat_interleave(2, 2).repeat_interleave(2, 3)
    monkeypatch.chdir(ROOT)
    sweep, given, found = sweeps.read_sweep("identification"), YAML(typ="safe", pure=True).load(Path("params.yaml")), {}
    for point, changes in sweep.points.items():
        rule = {name.removeprefix("identify."): value for name, value in {**sweep.shared, **changes}.items()}
        assert faults_of(given | {"identify": given["identify"] | rule}) == [], point
        found[point] = find_register_neurons(model, images, **rule)
    assert found["ours"].selected == truth and found["ours"].explained > 0.9
    busiest = found["activation_top_10"]
    assert busiest.detection == found["ours"].detection and busiest.num_selected == 10
    assert busiest.neurons[0].attribution is not None and 0 < busiest.explained < 1.1
    assert found["ours_percentile"].num_selected == found["activation_percentile"].num_selected == 1
    assert (found["published_150"].detection.threshold, found["published_150"].num_selected) == (150.0, 10)
