"""Small copies of the sets that choices/*.yaml names, in the layouts that they are published, unpacked and fetched in."""

import json
import pickle
from pathlib import Path

import numpy as np
import scipy.io
from data.test_dense_sets import make_ade, make_coco, make_devkit
from data.test_nyu import make_nyu
from data.test_pair_sets import make_buildings, make_spair
from PIL import Image
from stages.test_stages_zeroshot import make_mask_sets

WNIDS = ("n01440764", "n01443537", "n01484850")
IMAGENETTE = ("n01440764", "n02102040", "n02979186")
LISTED = {  # of OpenOOD: images
    **dict.fromkeys(("imagenet_v2", "imagenet_c", "imagenet_r"), 6),
    **dict.fromkeys(("ssb_hard", "ninco", "inaturalist", "textures", "openimage_o"), 4),
}
TEN = ("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck")
RNG = np.random.default_rng(0)


def picture(path: Path, kind: int) -> None:
    """Noise of the kind's colour on flat grey, where outliers can be planted."""
    path.parent.mkdir(parents=True, exist_ok=True)
    pixels = np.full((56, 60, 3), 120, dtype=np.uint8)
    pixels[10:40, 10:40] = RNG.integers(0, 120, (30, 30, 3), dtype=np.uint8)
    pixels[10:40, 10:40, kind % 3] = 250
    Image.fromarray(pixels).save(path)


def text(path: Path, lines: list[str]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(f"{line}\n" for line in lines))


def lay_out(images: Path) -> None:
    """What a user has in `{images}`, for all choices together."""
    imagenet(images)
    openood(images)
    cifar_arrays(images)
    for make in (make_devkit, make_coco, make_ade, make_spair, make_mask_sets):
        make(images)
    make_nyu(images / "nyu")
    make_buildings(images / "oxford")


def imagenet(images: Path) -> None:
    """ImageNet, other looks of it and its anomaly sets."""
    for kind, wnid in enumerate(WNIDS):
        for i in range(16):
            picture(images / f"imagenet/train/{wnid}/{wnid}_{i}.JPEG", kind)
        for i in range(4):
            picture(images / f"imagenet/val/{wnid}/ILSVRC2012_val_{kind}{i}.JPEG", kind)
        for i in range(2):
            for name in ("imagenet-a", "imagenet-r", "sketch"):
                picture(images / name / wnid / f"{i}.jpg", kind)
            picture(images / f"imagenetv2-matched-frequency-format-val/{kind}/{i}.jpeg", kind)
    for name in ("LSUN/test", "LSUN_resize/LSUN_resize", "iNaturalist/images"):
        for i in range(4):
            picture(images / name / f"{i}.jpg", i)


def openood(images: Path) -> None:
    """OpenOOD's lists, that of ImageNet-1k joined as the choice says."""
    for name, count in LISTED.items():
        lines = [f"{name}/{i % 3}/{i}.jpg {i % 3 if count == 6 else -1}" for i in range(count)]
        text(images / f"test_{name}.txt", lines)
        for i, line in enumerate(lines):
            picture(images / line.split()[0], i)
    own = [(s, i) for s, count in (("train", 36), ("val", 9), ("test", 12)) for i in range(count)]
    text(images / "imagenet.csv", [f"imagenet_1k/{split}/{i}.JPEG,{i % 3},{split}" for split, i in own])
    for split, i in own:
        picture(images / f"imagenet_1k/{split}/{i}.JPEG", i)


def cifar_arrays(images: Path) -> None:
    """CIFAR-10.1, and CIFAR-10-C with its five severities one after another."""
    np.save(images / "cifar10.1_v6_data.npy", noise(10))
    np.save(images / "cifar10.1_v6_labels.npy", np.arange(10, dtype=np.int32))
    (images / "CIFAR-10-C").mkdir()
    for name in ("gaussian_noise", "defocus_blur", "fog", "jpeg_compression"):
        np.save(images / f"CIFAR-10-C/{name}.npy", noise(50))
    np.save(images / "CIFAR-10-C/labels.npy", np.tile(np.arange(10), 5))


def noise(count: int) -> np.ndarray:
    return RNG.integers(0, 256, (count, 32, 32, 3), dtype=np.uint8)


def fetched(root: Path) -> None:
    """What torchvision leaves in work/downloads/torchvision; the digests of packed sets are the copies' own."""
    for split, count in (("train", 16), ("val", 4)):
        for kind, wnid in enumerate(IMAGENETTE):
            for i in range(count):
                picture(root / f"Imagenette/imagenette2/{split}/{wnid}/{split}_{i}.JPEG", kind)
    by_split = [("train", range(8)), ("val", range(8, 12)), ("test", range(12, 16))]  # two classes, one odd, one even
    for split, numbers in by_split:
        text(root / f"DTD/dtd/dtd/labels/{split}1.txt", [f"{texture(i)}/{texture(i)}_{i:04}.jpg" for i in numbers])
        aircraft = root / "FGVCAircraft/fgvc-aircraft-2013b/data"
        text(aircraft / f"images_variant_{split}.txt", [f"{i:07} {texture(i)}" for i in numbers])
        for i in numbers:
            picture(root / f"DTD/dtd/dtd/images/{texture(i)}/{texture(i)}_{i:04}.jpg", i)
            picture(aircraft / f"images/{i:07}.jpg", i)
            picture(root / f"Flowers102/flowers-102/jpg/image_{i + 1:05}.jpg", i)
            picture(root / f"Food101/food-101/images/{texture(i)}/{i}.jpg", i)
            picture(root / f"OxfordIIITPet/oxford-iiit-pet/images/{texture(i)}_{i}.jpg", i)
    text(aircraft / "variants.txt", ["dotted", "banded"])
    numbers = {key: np.array(list(n)) + 1 for key, (_, n) in zip(("trnid", "valid", "tstid"), by_split, strict=True)}
    scipy.io.savemat(root / "Flowers102/flowers-102/setid.mat", numbers)
    scipy.io.savemat(root / "Flowers102/flowers-102/imagelabels.mat", {"labels": np.arange(16) % 2 + 1})
    for split, numbers in (("train", range(12)), ("test", range(12, 16))):
        listed = {name: [f"{name}/{i}" for i in numbers if texture(i) == name] for name in ("banded", "dotted")}
        text(root / f"Food101/food-101/meta/{split}.json", [json.dumps(listed)])
        pets = [f"{texture(i)}_{i} {i % 2 + 1} 1 1" for i in numbers]
        text(root / f"OxfordIIITPet/oxford-iiit-pet/annotations/{split.replace('train', 'trainval')}.txt", pets)
    text(root / "Places365/categories_places365.txt", ["/a/airfield 0", "/z/zen_garden 1"])
    text(root / "Places365/places365_val.txt", [f"Places365_val_{i:08}.jpg {i % 2}" for i in range(4)])
    for i in range(4):
        picture(root / f"Places365/val_256/Places365_val_{i:08}.jpg", i)
    (root / "SVHN").mkdir()
    digits = {"X": noise(4).transpose(1, 2, 3, 0), "y": np.array([[10], [1], [9], [3]], dtype=np.uint8)}
    scipy.io.savemat(root / "SVHN/test_32x32.mat", digits)
    ten = root / "CIFAR10/cifar-10-batches-py"
    pickled(ten / "batches.meta", {"label_names": list(TEN)})
    for name in (*(f"data_batch_{i}" for i in range(1, 6)), "test_batch"):
        pickled(ten / name, {"data": noise(20).reshape(20, -1), "labels": [*range(10)] * 2})
    hundred = root / "CIFAR100/cifar-100-python"
    pickled(hundred / "meta", {"fine_label_names": [f"fine{i}" for i in range(100)]})
    for name, count in (("train", 24), ("test", 6)):
        pickled(hundred / name, {"data": noise(count).reshape(count, -1), "fine_labels": [5, 7] * (count // 2)})


def texture(i: int) -> str:
    return ("banded", "dotted")[i % 2]


def pickled(path: Path, content: dict) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(pickle.dumps(content))
