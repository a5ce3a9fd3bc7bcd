import json
from dataclasses import replace

import numpy as np
import pytest
import timm
import torch
from PIL import Image

from regvit.backbones import load_backbone, save_backbone
from regvit.classify import Classifier, UnreadableImage, choose_probe, image_files
from regvit.extraction import describe, extract
from regvit.images import Transform
from regvit.logistic import fit_logistic
from regvit.manifest import Row, read_dataset, write_dataset
from regvit.probes import InvalidProbes, save_probes, train_probes
from regvit.progress import progress
from regvit.readouts import read_all
from regvit.runs import describe_run, open_run
from regvit.store import FeatureStore, fingerprint

SIZE = 32
CLASSES = ("blue", "green", "red")
READOUTS = ("cls", "reg_mean", "patch_mean", "cls_reg", "cls_reg_learned", "cls_reg_attn", "cls_random", "cls_noise")


def picture(i):
    """Noise, its class the channel that is a little brighter; of several sizes."""
    rng = np.random.default_rng(i)
    pixels = rng.integers(0, 256, (40 + i % 7, 33 + i % 5, 3)) // 2
    pixels[..., 2 - i % 3] += 110
    return pixels.astype(np.uint8)


@pytest.fixture(scope="module")
def project(tmp_path_factory):
    """A backbone, two runs of it, a data set, its features under the run with three test-time registers, and probes."""
    folder = tmp_path_factory.mktemp("project")
    torch.manual_seed(0)
    arguments = {"num_classes": 0, "img_size": SIZE}
    save_backbone(
        folder / "backbones/tiny", timm.create_model("test_vit", pretrained=False, **arguments).eval(), name="tiny",
        architecture="test_vit", model_args=arguments, transform=Transform(SIZE, (0.5,) * 3, (0.5,) * 3),
        source="random weights", licence="MIT",
    )  # fmt: skip
    backbone = load_backbone(folder / "backbones/tiny")
    runs = {
        "cured": describe_run("cured", backbone, "test_time", 3, {1: (3, 5)}),
        "plain": describe_run("plain", backbone, "none", 0, {}),
    }
    for name, run in runs.items():
        (folder / f"{name}.json").write_text(json.dumps(run))
    rows = []
    (folder / "data/images").mkdir(parents=True)
    for i in range(60):
        Image.fromarray(picture(i)).save(folder / f"data/images/{i:02}.png")
        rows.append(Row(str(i), f"images/{i:02}.png", CLASSES[i % 3], ("train", "train", "val", "test")[i // 3 % 4]))
    write_dataset(folder / "data", "noise", rows, CLASSES, {})
    dataset, opened = read_dataset(folder / "data"), open_run(folder / "cured.json", folder / "backbones")
    neurons = runs["cured"].pop("neurons")
    attributes = describe(opened, dataset, "float32") | runs["cured"] | {"neurons_sha256": fingerprint(neurons)}
    extract(opened, dataset, folder / "noise.zarr", folder / "partial", attributes)
    store = FeatureStore.open(folder / "noise.zarr")
    features, labels = read_all(store, READOUTS), dataset.labels()
    parts = []
    for split in ("train", "val"):
        kept = np.flatnonzero([row.split == split for row in rows])
        parts += [{name: values[kept] for name, values in features.items()}, labels[kept]]
    probes = train_probes(*parts, CLASSES, [0.01, 0.1], 200, 64, seeds=(0, 1), channels=64).probes
    train, y, val, w = parts
    logistic = {name: fit_logistic(name, train[name], y, val[name], w, CLASSES) for name in ("cls", "cls_reg_attn")}
    probes = replace(probes, logistic=logistic, origin=store.attributes)
    save_probes(folder / "probes.safetensors", probes)
    return folder, features, probes


def load(folder, readout=None, **options):
    given = {"run": "cured.json", "probes": "probes.safetensors"} | options
    files = folder / given.pop("run"), folder / given.pop("probes")
    return Classifier.load(folder / "backbones/tiny", *files, readout, **given)


@pytest.mark.parametrize("name", [name for name in READOUTS if name != "cls_noise"])
def test_images_get_the_logits_that_their_stored_features_get(project, name):
    folder, features, probes = project
    classifier = load(folder, name, seed=1)
    images = sorted((folder / "data/images").iterdir())
    found = classifier.classify(images, batch_size=7, workers=2)
    expected = probes.probes[name][1].logits(features[name])
    # float16 rounds a channel by at most 2^-11 of it; a logit's error is bounded by the weights times that.
    probe = probes.probes[name][1]
    bound = 4 * 2**-11 * (np.abs(probe.embed(features[name])) @ np.abs(probe.weight).T) + 1e-3
    assert (np.abs(np.stack([image.logits for image in found]) - expected) <= bound).all()
    assert [image.path for image in found] == images


def test_the_answer_is_the_class_of_the_largest_logit_with_its_softmax(project):
    folder, _, _ = project
    for i, image in enumerate(
        load(folder, "patch_mean").classify([folder / f"data/images/{i:02}.png" for i in range(6)])
    ):
        shares = np.exp(image.logits.astype(np.float64))
        assert image.class_name == CLASSES[image.logits.argmax()]
        assert image.probability == pytest.approx(shares.max() / shares.sum(), rel=1e-5)
        assert image.energy == pytest.approx(-np.log(shares.sum()), rel=1e-5)
        assert image.class_name == CLASSES[i % 3]  # bright channels are easy


def test_images_in_memory_are_classified_as_their_files(project):
    folder, _, _ = project
    classifier = load(folder, "cls")
    from_file, from_memory = classifier.classify([str(folder / "data/images/05.png"), Image.fromarray(picture(5))])
    assert np.array_equal(from_file.logits, from_memory.logits)
    assert from_memory.path is None and from_file.path == folder / "data/images/05.png"


def test_logistic_regression_classifies_as_well(project):
    folder, features, probes = project
    (found,) = load(folder, "cls_reg_attn", classifier="logistic").classify([folder / "data/images/04.png"])
    expected = probes.logistic["cls_reg_attn"].logits(features["cls_reg_attn"][4:5])[0]
    np.testing.assert_allclose(found.logits, expected, atol=0.02 * np.abs(expected).max())


def test_a_folder_is_classified_although_some_of_its_files_are_broken(project, tmp_path):
    folder, _, _ = project
    (tmp_path / "below").mkdir()
    for i, name in enumerate(("b.png", "below/a.PNG", "c.png")):
        Image.fromarray(picture(i)).save(tmp_path / name, format="png")
    (tmp_path / "torn.png").write_bytes((tmp_path / "b.png").read_bytes()[:900])
    (tmp_path / "empty.jpg").touch()
    (tmp_path / "notes.txt").write_text("no image")
    (tmp_path / ".hidden.png").touch()
    with progress(5, None) as bar:
        found = load(folder, "cls").classify_folder(tmp_path, batch_size=2, workers=1, progress=bar)
    assert [str(image.path.relative_to(tmp_path)) for image in found.images] == ["b.png", "below/a.PNG", "c.png"]
    assert [error.path.name for error in found.unreadable] == ["empty.jpg", "torn.png"]
    assert found.unreadable[0].reason == "empty file" and bar.done == 5
    with pytest.raises(UnreadableImage, match=r"empty\.jpg cannot be read as an image: empty file"):
        load(folder, "cls").classify([tmp_path / "b.png", tmp_path / "empty.jpg"])


def test_a_folder_without_images_is_an_error(tmp_path):
    with pytest.raises(FileNotFoundError, match="none is not a folder; give one that holds images"):
        image_files(tmp_path / "none")
    (tmp_path / "notes.txt").touch()
    with pytest.raises(ValueError, match="holds no file with the extension of an image format"):
        image_files(tmp_path)


def test_without_a_wish_the_best_on_validation_is_taken(project):
    _, _, probes = project
    every = [probe for name, of_seeds in probes.probes.items() for probe in of_seeds if name != "cls_noise"]
    assert choose_probe(probes, None).val_correct == max(probe.val_correct for probe in every)
    assert choose_probe(probes, "cls", seed=1) is probes.probes["cls"][1]
    worse, better = (replace(probes.probes["cls"][0], val_correct=n) for n in (3, 9))
    assert choose_probe(replace(probes, probes={"cls": (worse, better)}), "cls") is better


@pytest.mark.parametrize(
    ("wish", "message"),
    [
        ({"readout": "cls_patch"}, "there is no linear probe of readout 'cls_patch'; there are cls, reg_mean"),
        ({"readout": "cls_noise"}, "readout 'cls_noise' takes its noise from the spread of a whole data set"),
        ({"readout": "reg_mean", "classifier": "logistic"}, "no logistic probe of readout 'reg_mean'; there are cls, "),
        ({"readout": "cls", "classifier": "knn"}, "classifier is 'knn'; expected one of linear, logistic"),
        ({"readout": "cls", "seed": 7}, "there is no linear probe of seed 7; there are 0, 1"),
        ({"readout": "cls", "classifier": "logistic", "seed": 0}, "logistic regression has no seed"),
    ],
)
def test_a_probe_that_is_not_there_is_named_with_those_that_are(project, wish, message):
    with pytest.raises(ValueError, match=message):
        load(project[0], **wish)


def test_probes_of_another_run_and_folders_of_another_backbone_are_refused(project, tmp_path):
    folder, _, probes = project
    with pytest.raises(InvalidProbes, match="trained on features of another run than plain: registers, num_registers"):
        load(folder, "cls", run="plain.json")
    with pytest.raises(
        ValueError, match=r"run cured is of backbone 'tiny', and the folder is .*; give the folder named"
    ):
        Classifier.load(tmp_path, folder / "cured.json", folder / "probes.safetensors")
    save_probes(folder / "unsaid.safetensors", replace(probes, origin={}))
    assert load(folder, "cls", run="plain.json", probes="unsaid.safetensors").classes == CLASSES


def test_a_readout_that_the_run_cannot_give_is_an_error(project):
    folder, _, probes = project
    save_probes(folder / "unsaid.safetensors", replace(probes, origin={}))
    classifier = load(folder, "cls_reg", run="plain.json", probes="unsaid.safetensors")
    with pytest.raises(ValueError, match="readout 'cls_reg' cannot be made: the run has no registers"):
        classifier.classify([folder / "data/images/00.png"])


def test_batches_and_workers_out_of_range_are_refused(project):
    with pytest.raises(ValueError, match="batch_size 0 must be at least 1 and workers 0 at least 0"):
        load(project[0], "cls").classify([], batch_size=0)
