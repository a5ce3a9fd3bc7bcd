"""Small local copies in the very formats on disk that torchvision's sets and the .npy sets are published in."""

import hashlib
import pickle
from pathlib import Path

import numpy as np
import pytest
import scipy.io
import torchvision.datasets
from PIL import Image

from regvit.data.packages import DownloadFailed
from regvit.data.sources import Made, torchvision_sets

GENERATOR = np.random.default_rng(0)
TEN = ("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck")


@pytest.fixture
def place(tmp_path):
    """The folder of a torchvision set."""

    def place(name: str) -> Path:
        folder = tmp_path / "downloads/torchvision" / name
        folder.mkdir(parents=True)
        return folder

    return place


def jpeg(path: Path, value: int = 0) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (8, 8), (value, 50, 50)).save(path)


def pixels(made: Made, i: int) -> np.ndarray:
    return np.asarray(Image.open(made.dataset.image_path(i)))


# CIFAR.


def noise(count: int) -> np.ndarray:
    return GENERATOR.integers(0, 256, (count, 32, 32, 3), dtype=np.uint8)


@pytest.fixture
def cifar(place, monkeypatch):
    """Write CIFAR in the folder of its name: a pickle a batch, the digests that torchvision asks for adjusted."""

    def cifar(name: str, batches: dict[str, list[int]], meta: dict) -> dict[str, np.ndarray]:
        kind, images = getattr(torchvision.datasets, name), {}
        folder = place(name) / kind.base_folder
        folder.mkdir()

        def md5(file: str, content: dict) -> list[str]:
            (folder / file).write_bytes(pickle.dumps(content))
            return [file, hashlib.md5((folder / file).read_bytes()).hexdigest()]

        entries = []
        for file, labels in batches.items():
            images[file] = noise(len(labels))
            planes = images[file].transpose(0, 3, 1, 2).reshape(len(labels), -1)  # red, green, blue, row by row
            entries.append(md5(file, {"data": planes, kind.meta["key"].replace("label_names", "labels"): labels}))
        monkeypatch.setattr(kind, "train_list", [entry for entry in entries if "test" not in entry[0]])
        monkeypatch.setattr(kind, "test_list", [entry for entry in entries if "test" in entry[0]])
        monkeypatch.setattr(kind, "meta", kind.meta | {"md5": md5(kind.meta["filename"], meta)[1]})
        return images

    return cifar


@pytest.fixture
def cifar10(cifar):
    """CIFAR-10 with 4 images a batch, labels 0 to 3; its images by batch."""
    names = [*(f"data_batch_{i}" for i in range(1, 6)), "test_batch"]
    return cifar("CIFAR10", {name: [0, 1, 2, 3] for name in names}, {"label_names": list(TEN)})


def test_cifar_10_comes_out_pixel_for_pixel_with_its_class_names(make, cifar10):
    made = make("torchvision:CIFAR10/test", role="ood")
    assert [row.label for row in made.dataset.rows] == ["airplane", "automobile", "bird", "cat"]
    assert made.dataset.classes == ("airplane", "automobile", "bird", "cat")
    for i in range(4):
        assert np.array_equal(pixels(made, i), cifar10["test_batch"][i])


def test_cifar_to_train_on_has_its_test_split_and_a_val_split_out_of_train(make, cifar10):
    dataset = make("torchvision:CIFAR10", role="id").dataset
    assert {row.image_id for row in dataset.subset("test").rows} == {f"test_{i:05}" for i in range(4)}
    assert [len(dataset.subset(split)) for split in ("train", "val")] == [16, 4]
    other = make("torchvision:CIFAR10", "other", role="anomaly").dataset
    assert {row.image_id[:4] for row in other.rows} == {"test"}


def test_cifar_100_has_the_fine_labels(make, cifar):
    batches = {"train": [1], "test": [5, 99, 0]}
    images = cifar("CIFAR100", batches, {"fine_label_names": [f"fine{i}" for i in range(100)]})
    made = make("torchvision:CIFAR100/test", role="anomaly")
    assert [row.label for row in made.dataset.rows] == ["fine5", "fine99", "fine0"]
    assert np.array_equal(pixels(made, 1), images["test"][1])


def test_a_batch_of_another_digest_is_not_unpickled(make, cifar10, place, tmp_path, monkeypatch):
    (file,) = tmp_path.rglob("data_batch_1")
    file.write_bytes(pickle.dumps({"data": noise(1), "labels": [0]}))
    monkeypatch.setattr(pickle, "load", None)
    monkeypatch.setattr(torchvision.datasets.CIFAR10, "url", "http://127.0.0.1:9/x")
    with pytest.raises(DownloadFailed, match="torchvision could not fetch or open CIFAR10"):
        make("torchvision:CIFAR10")


# SVHN.


def test_svhn_comes_out_pixel_for_pixel_and_its_label_10_is_the_digit_0(make, place, monkeypatch):
    folder, images = place("SVHN"), noise(3)
    scipy.io.savemat(
        folder / "test_32x32.mat",
        {"X": images.transpose(1, 2, 3, 0), "y": np.array([[10], [1], [9]], dtype=np.uint8)},
    )
    md5 = hashlib.md5((folder / "test_32x32.mat").read_bytes()).hexdigest()
    address, file, _ = torchvision.datasets.SVHN.split_list["test"]
    monkeypatch.setitem(torchvision.datasets.SVHN.split_list, "test", [address, file, md5])
    made = make("torchvision:SVHN/test", role="anomaly")
    assert [row.label for row in made.dataset.rows] == ["0", "1", "9"]
    assert all(np.array_equal(pixels(made, i), images[i]) for i in range(3))


# Sets of files.


def dtd(folder: Path) -> None:
    """DTD as its archive unpacks: dtd/dtd/{images,labels}."""
    lists = {"train": ["banded/banded_0001.jpg", "dotted/dotted_0001.jpg"], "val": ["banded/banded_0002.jpg"], "test": ["dotted/dotted_0002.jpg", "banded/banded_0003.jpg"]}  # fmt: skip
    (folder / "dtd/dtd/labels").mkdir(parents=True)
    for split, names in lists.items():
        (folder / f"dtd/dtd/labels/{split}1.txt").write_text("".join(f"{name}\n" for name in names))
        for name in names:
            jpeg(folder / "dtd/dtd/images" / name)


def test_dtd_is_read_in_place_with_its_three_splits(make, place):
    folder = place("DTD")
    dtd(folder)
    dataset = make("torchvision:DTD", role="id").dataset
    assert {row.path.removeprefix("dtd/dtd/images/"): (row.label, row.split) for row in dataset.rows} == {
        "banded/banded_0001.jpg": ("banded", "train"),
        "dotted/dotted_0001.jpg": ("dotted", "train"),
        "banded/banded_0002.jpg": ("banded", "val"),
        "banded/banded_0003.jpg": ("banded", "test"),
        "dotted/dotted_0002.jpg": ("dotted", "test"),
    }
    assert dataset.root == folder


def test_dtd_as_anomalies_is_its_test_split_in_an_order_that_does_not_depend_on_lists(make, place):
    dtd(place("DTD"))
    rows = make("torchvision:DTD", role="anomaly").dataset.rows
    assert [row.path.split("/")[-1] for row in rows] == ["banded_0003.jpg", "dotted_0002.jpg"]
    assert {row.split for row in make("torchvision:DTD/train", "t", role="anomaly").dataset.rows} == {"test"}
    assert len(make("torchvision:DTD/all", "a", role="anomaly").dataset.subset("test")) == 5


def test_places365_is_read_in_place_with_its_category_names(make, place, monkeypatch):
    folder, kind = place("Places365"), torchvision.datasets.Places365
    (folder / "categories_places365.txt").write_text("/a/airfield 0\n/a/airplane_cabin 1\n/z/zen_garden 2\n")
    (folder / "places365_val.txt").write_text("Places365_val_00000001.jpg 2\nPlaces365_val_00000002.jpg 0\n")
    for i in (1, 2):
        jpeg(folder / f"val_256/Places365_val_0000000{i}.jpg")

    def md5(file: str) -> str:
        return hashlib.md5((folder / file).read_bytes()).hexdigest()

    monkeypatch.setattr(kind, "_CATEGORIES_META", ("categories_places365.txt", md5("categories_places365.txt")))
    monkeypatch.setitem(kind._FILE_LIST_META, "val", ("places365_val.txt", md5("places365_val.txt")))
    dataset = make("torchvision:Places365", role="anomaly").dataset
    assert [(row.path, row.label, row.split) for row in dataset.rows] == [
        ("val_256/Places365_val_00000001.jpg", "/z/zen_garden", "test"),
        ("val_256/Places365_val_00000002.jpg", "/a/airfield", "test"),
    ]


def test_oxford_pets_are_read_in_place(make, place):
    base = place("OxfordIIITPet") / "oxford-iiit-pet"
    (base / "annotations").mkdir(parents=True)
    (base / "annotations/test.txt").write_text("Abyssinian_1 1 1 1\nyorkshire_terrier_2 2 2 1\n")
    for name in ("Abyssinian_1", "yorkshire_terrier_2"):
        jpeg(base / f"images/{name}.jpg")
    rows = make("torchvision:OxfordIIITPet/test", role="ood").dataset.rows
    assert [row.label for row in rows] == ["Abyssinian", "Yorkshire Terrier"]


def test_eurosat_and_inaturalist_are_read_in_place(make, place):
    base = place("EuroSAT") / "eurosat/2750"
    for name in ("Forest/Forest_1.jpg", "River/River_1.jpg"):
        jpeg(base / name)
    dataset = make("torchvision:EuroSAT", role="ood").dataset
    assert [row.label for row in dataset.rows] == ["Forest", "River"]
    nature = (
        place("INaturalist")
        / "2021_valid/00000_Animalia_Annelida_Clitellata_Haplotaxida_Lumbricidae_Lumbricus_terrestris"
    )
    jpeg(nature / "x.jpg")
    assert [row.label for row in make("torchvision:INaturalist", "n", role="anomaly").dataset.rows] == [nature.name]


def test_imagenette_has_the_wnids_of_imagenet(make, place):
    base = place("Imagenette") / "imagenette2"
    for split in ("train", "val"):
        for wnid in torchvision.datasets.Imagenette._WNID_TO_CLASS:
            for i in range(4):
                jpeg(base / split / wnid / f"{split}_{i}.JPEG")
    dataset = make("torchvision:Imagenette", role="id").dataset
    assert dataset.classes == tuple(sorted(torchvision.datasets.Imagenette._WNID_TO_CLASS))
    assert {row.path.split("/")[1] for row in dataset.subset("test").rows} == {"val"}


# Faults.


def test_a_set_that_cannot_be_fetched_says_so(make, monkeypatch):
    def fail(*_, **__):
        raise OSError("the network is unreachable")

    monkeypatch.setattr(torchvision.datasets.DTD, "_download", fail)
    with pytest.raises(
        DownloadFailed, match=r"could not fetch or open DTD: the network is unreachable; .*/torchvision/DTD"
    ):
        make("torchvision:DTD")


def test_unknown_names_and_splits_are_answered_with_the_known_ones(make):
    with pytest.raises(
        ValueError, match=r"torchvision's 'Cifar10' is not among .*; nearest is 'CIFAR10', known are CIFAR10"
    ):
        make("torchvision:Cifar10")
    with pytest.raises(ValueError, match="torchvision:SVHN has no split 'extra'; it has train, test"):
        make("torchvision:SVHN/extra")
    with pytest.raises(ValueError, match="torchvision:EuroSAT has no split 'test'; it has none"):
        make("torchvision:EuroSAT/test")


def test_every_set_is_one_of_torchvisions():
    for name in torchvision_sets.SETS:
        assert issubclass(getattr(torchvision.datasets, name), torchvision.datasets.VisionDataset)


# Arrays.


def test_a_severity_of_cifar_10_c_is_its_fifth_of_the_array(make, tmp_path):
    images, labels = noise(15), np.tile([0, 1, 9], 5)
    np.save(tmp_path / "fog.npy", images)
    np.save(tmp_path / "labels.npy", labels)
    names = {"airplane": [0], "automobile": [1], "truck": [9]}
    made = make(f"npy:{tmp_path}/fog.npy:2", role="ood", classes=names)
    assert [row.label for row in made.dataset.rows] == ["airplane", "automobile", "truck"]
    assert all(np.array_equal(pixels(made, i), images[3 + i]) for i in range(3))
    assert len(make(f"npy:{tmp_path}/fog.npy", "all", role="ood").dataset) == 15


def test_cifar_10_1_has_its_labels_beside_it(make, tmp_path):
    np.save(tmp_path / "cifar10.1_v6_data.npy", noise(2))
    np.save(tmp_path / "cifar10.1_v6_labels.npy", np.array([3, 5], dtype=np.int32))
    assert [row.label for row in make(f"npy:{tmp_path}/cifar10.1_v6_data.npy", role="ood").dataset.rows] == ["3", "5"]


def test_arrays_of_another_kind_are_refused(make, tmp_path):
    np.save(tmp_path / "labels.npy", np.zeros(3, dtype=np.int64))
    cases = {
        "float": (np.zeros((3, 4, 4, 3)), "", r"is float64 \(3, 4, 4, 3\); expected uint8 images"),
        "grey": (np.zeros((3, 4, 4), np.uint8), "", "expected uint8 images of shape"),
        "many": (np.zeros((4, 4, 4, 3), np.uint8), "", "expected 4 integers"),
        "uneven": (np.zeros((3, 4, 4, 3), np.uint8), ":1", "severities are 1 to 5, in as many equal parts"),
    }
    for name, (array, severity, said) in cases.items():
        np.save(tmp_path / f"{name}.npy", array)
        with pytest.raises(ValueError, match=said):
            make(f"npy:{tmp_path}/{name}.npy{severity}")
    with pytest.raises(FileNotFoundError, match=r"gone\.npy does not exist; `npy:` takes"):
        make(f"npy:{tmp_path}/gone.npy")
