"""Images in the wild, and that none of them changes the row of another. (tests/data has more.)"""

import contextlib
import hashlib
import io
import os
import shutil
import subprocess
import sys
import tempfile
import tracemalloc
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import EpsImagePlugin, Image, PngImagePlugin, PpmImagePlugin

from regvit.data.dataset_builder import TooManyRejects
from regvit.data.decoding import MAX_BYTES, UnreadableImage, original_size, read_rgb
from regvit.data.dense_labels import read_mask
from regvit.data.manifest import read_dataset
from regvit.data.sources import make_dataset
from regvit.data.transform import Transform
from regvit.features.extraction import Options, extract
from regvit.features.store import FeatureStore
from regvit.models.backbones import Backbone

TRANSFORM = Transform(32, (0.5, 0.5, 0.5), (0.5, 0.5, 0.5))


def noise(width=40, height=40, seed=0):
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8))


def encoded(image, kind, **options):
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


def made_of(folder, place, **options):
    options = {"role": "ood", "max_rejects": 0.99} | options
    return make_dataset(f"folder:{folder}", "wild", place / "data/wild", place / "packages", 0, False, **options)


# What each kind of file may be. (image, what it must show at its top left, or None where noise stands there)

GREY = Image.fromarray(np.full((40, 40), 77, dtype=np.uint8))
READ = {
    "grey.jpg": lambda: encoded(GREY, "JPEG", quality=100),
    "grey_alpha.png": lambda: encoded(Image.merge("LA", (GREY, Image.new("L", (40, 40), 255))), "PNG"),
    "bits.png": lambda: encoded(GREY.convert("1"), "PNG"),
    "deep.png": lambda: encoded(Image.fromarray(np.full((40, 40), 77 * 257, dtype=np.uint16)), "PNG"),
    "deep.tif": lambda: encoded(Image.fromarray(np.full((40, 40), 77 * 257, dtype=np.uint16)), "TIFF"),
    "cmyk.jpg": lambda: encoded(noise().convert("CMYK"), "JPEG"),
    "cmyk.tif": lambda: encoded(noise().convert("CMYK"), "TIFF"),
    "lab.tif": lambda: encoded(noise().convert("LAB"), "TIFF"),
    "ycc.jpg": lambda: encoded(noise().convert("YCbCr"), "JPEG"),
    "palette.png": lambda: encoded(noise().quantize(16), "PNG"),
    "palette_alpha.png": lambda: encoded(noise().quantize(16), "PNG", transparency=bytes(range(0, 256, 16))),
    "palette.gif": lambda: encoded(noise().quantize(16), "GIF", transparency=2),
    "rgb_key.png": lambda: encoded(noise(), "PNG", transparency=(1, 2, 3)),
    "moving.gif": lambda: encoded(noise(), "GIF", save_all=True, append_images=[noise(seed=1), noise(seed=2)]),
    "moving.png": lambda: encoded(noise(), "PNG", save_all=True, append_images=[noise(seed=1)]),
    "moving.webp": lambda: encoded(noise(), "WEBP", save_all=True, append_images=[noise(seed=1)]),
    "pages.tif": lambda: encoded(noise(), "TIFF", save_all=True, append_images=[noise(8, 8)]),
    "wrong_suffix.jpg": lambda: encoded(noise(), "PNG"),
    "wrong_suffix.png": lambda: encoded(noise(), "BMP"),
    "progressive.jpg": lambda: encoded(noise(), "JPEG", progressive=True),
    "trailing_bytes.png": lambda: encoded(noise(), "PNG") + b"\0" * 100,
    "broken_exif.jpg": lambda: encoded(noise(), "JPEG", exif=b"Exif\0\0MM\0*\0\0\0\x08\xff\xff\x01\x12"),
    "unknown_turn.jpg": lambda: encoded(noise(), "JPEG", exif=turned(77)),
    "dot.png": lambda: encoded(Image.new("RGB", (1, 1), (9, 8, 7)), "PNG"),
    "line.png": lambda: encoded(noise(1, 3000), "PNG"),
    "ü 日本 'quoted', \"twice\".png": lambda: encoded(noise(), "PNG"),
    "%s {0} $HOME `ls`;.png": lambda: encoded(noise(), "PNG"),
    "-rf.png": lambda: encoded(noise(), "PNG"),
    "=cmd|' !A1.png": lambda: encoded(noise(), "PNG"),
}


def turned(orientation):
    exif = Image.Exif()
    exif[0x0112] = orientation
    return exif


@pytest.mark.parametrize("name", sorted(READ))
def test_an_image_of_an_unusual_kind_is_read_as_three_channels(tmp_path, name):
    (tmp_path / name).write_bytes(READ[name]())
    loaded = TRANSFORM.load(tmp_path / name)
    assert loaded.shape == (3, 32, 32) and loaded.dtype == torch.uint8
    if name.startswith(("grey", "deep")):
        assert loaded.unique().tolist() == [77]
    if name.startswith(("moving", "wrong", "trailing", "ü")):  # the first frame, as it is
        first = torch.from_numpy(np.array(TRANSFORM.crop(noise()))).permute(2, 0, 1).float()
        assert (loaded.float() - first).abs().mean() < 40  # GIF and WebP lose colours
        if name.endswith(".png"):
            assert torch.equal(loaded.float(), first)


@pytest.mark.parametrize("orientation", range(1, 9))
def test_every_exif_orientation_is_turned_upright(tmp_path, orientation):
    """A camera's file is made from the upright image by the inverse of what the tag (TIFF 6.0, 0x0112) asks for."""
    upright = np.arange(6, dtype=np.uint8).reshape(2, 3) * 40
    stored = {1: upright, 2: upright[:, ::-1], 3: upright[::-1, ::-1], 4: upright[::-1], 5: upright.T,
              6: np.rot90(upright), 7: upright[::-1, ::-1].T, 8: np.rot90(upright, -1)}[orientation]  # fmt: skip
    Image.fromarray(np.ascontiguousarray(stored)).convert("RGB").save(tmp_path / "x.png", exif=turned(orientation))
    np.testing.assert_array_equal(np.asarray(read_rgb(tmp_path / "x.png"))[..., 0], upright)


def text_bomb():
    """A PNG whose compressed comment unpacks to 80 MB, of which Pillow reads 1."""
    info = PngImagePlugin.PngInfo()
    info.add_text("comment", "a" * 80_000_000, zip=True)
    return encoded(noise(), "PNG", pnginfo=info)


REFUSED = {
    "empty.png": (lambda: b"", "empty file"),
    "zeros.png": (lambda: bytes(1000), "not an image of a known format"),
    "page.jpg": (lambda: b"<!doctype html><title>404</title>", "not an image of a known format"),
    "drawing.png": (lambda: b'<svg xmlns="http://www.w3.org/2000/svg"/>', "not an image of a known format"),
    "header_only.png": (lambda: encoded(noise(), "PNG")[:33], "."),
    "header_only.jpg": (lambda: encoded(noise(), "JPEG")[:200], "."),
    "truncated.jpg": (lambda: encoded(noise(), "JPEG")[:-200], "truncated"),
    "truncated.png": (lambda: encoded(noise(), "PNG")[:-300], "truncated|broken"),
    "truncated.webp": (lambda: encoded(noise(), "WEBP")[:-300], "."),
    "truncated.tif": (lambda: encoded(noise(), "TIFF")[:-300], "."),
    "truncated.gif": (lambda: encoded(noise(), "GIF")[:-700], "."),
    "flipped_bits.png": (lambda: flipped(encoded(noise(), "PNG"), 500), "."),
    "float.tif": (lambda: encoded(Image.fromarray(np.zeros((4, 4), np.float32)), "TIFF"), "floats of unknown range"),
    "deeper.tif": (lambda: encoded(Image.fromarray(np.full((4, 4), 1 << 20, np.int32)), "TIFF"), "beyond 16 bits"),
    "text_bomb.png": (text_bomb, "."),
}  # fmt: skip


def flipped(content, at):
    return content[:at] + bytes([content[at] ^ 0xFF]) + content[at + 1 :]


@pytest.mark.parametrize("name", sorted(REFUSED))
def test_a_broken_image_is_refused_with_its_reason(tmp_path, name):
    content, reason = REFUSED[name]
    (tmp_path / name).write_bytes(content())
    with pytest.raises(UnreadableImage, match=rf"{name} cannot be read as an image: .*({reason}).*; replace the file"):
        read_rgb(tmp_path / name)


@pytest.mark.parametrize("size", [(1, 30_000), (30_000, 1), (2, 60_000)])
def test_a_very_long_image_of_few_bytes_does_not_grow_to_gigabytes_when_it_is_resized(tmp_path, size):
    Image.new("RGB", size, (10, 20, 30)).save(tmp_path / "long.png")
    grown = []
    real = Image.Image.resize

    def resize(image, new, *more, **options):
        grown.append(new[0] * new[1])
        assert grown[-1] <= 102 * 224**2, f"a line of {size} px is resized to {new} to keep 224 of it"
        return real(image, new, *more, **options)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Image.Image, "resize", resize)
        loaded = Transform(224, (0.5,) * 3, (0.5,) * 3).load(tmp_path / "long.png")
    assert loaded.flatten(1).unique(dim=1).tolist() == [[10], [20], [30]] and grown


def test_the_middle_of_a_very_long_image_is_what_is_seen(tmp_path):
    pixels = np.zeros((3001, 3, 3), dtype=np.uint8)
    pixels[1499:1502] = 200  # the middle square
    Image.fromarray(pixels).save(tmp_path / "long.png")
    loaded = Transform(30, (0.5,) * 3, (0.5,) * 3, "nearest").load(tmp_path / "long.png")
    assert loaded.unique().tolist() == [200]


# What would run another program, decoders that fail in ways of their own, and files that are too large.


@pytest.fixture
def ghostscript(tmp_path, monkeypatch):
    """A file that is there once somebody has called `gs`."""
    called = tmp_path / "called"
    (tmp_path / "bin").mkdir()
    (tmp_path / "bin/gs").write_text(f"#!/bin/sh\ntouch '{called}'\n")
    (tmp_path / "bin/gs").chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path / 'bin'}:{os.environ['PATH']}")
    monkeypatch.setattr(EpsImagePlugin, "gs_binary", None)  # what Pillow remembers of a gs that it looked for
    return called


def test_postscript_under_the_name_of_a_photograph_starts_no_program(tmp_path, ghostscript):
    (tmp_path / "wild/x").mkdir(parents=True)
    noise().save(tmp_path / "wild/x/good.png")
    noise().save(tmp_path / "wild/x/bad.jpg", "EPS")
    made = made_of(tmp_path / "wild", tmp_path)
    assert {one.path: one.reason for one in made.rejected} == {"x/bad.jpg": "not an image of a known format"}
    for read in (read_rgb, read_mask, original_size, TRANSFORM.load):
        with pytest.raises(
            UnreadableImage, match=r"bad\.jpg cannot be read as an image: .*(known format|cannot identify)"
        ):
            read(tmp_path / "wild/x/bad.jpg")
    assert not ghostscript.exists()
    with contextlib.suppress(OSError), Image.open(tmp_path / "wild/x/bad.jpg") as image:
        image.load()  # without a list of formats Pillow does call it
    assert ghostscript.exists()


@pytest.mark.parametrize("kind", ["AVIF", "BMP", "DIB", "GIF", "ICO", "JPEG", "JPEG2000", "MPO", "PCX", "PNG", "PPM", "QOI",
                                  "SGI", "TGA", "TIFF", "WEBP"])  # fmt: skip
def test_images_of_pixels_of_the_usual_formats_are_read(tmp_path, kind):
    try:
        content = encoded(noise(32, 32), kind)
    except (KeyError, OSError) as error:
        pytest.skip(f"this Pillow does not write {kind}: {error}")
    (tmp_path / "x").write_bytes(content)
    assert read_rgb(tmp_path / "x").size == (32, 32)


@pytest.mark.parametrize("error", [NotImplementedError, AttributeError, MemoryError, RecursionError, ZeroDivisionError])
def test_whatever_a_decoder_raises_costs_the_one_image(tmp_path, monkeypatch, error):
    (tmp_path / "wild/x").mkdir(parents=True)
    for i in range(2):
        noise(seed=i).save(tmp_path / f"wild/x/{i}.png")
    noise().save(tmp_path / "wild/x/bad.ppm")

    def decode(*_):
        raise error("a fault of the decoder")

    monkeypatch.setattr(PpmImagePlugin.PpmImageFile, "load", decode)
    made = made_of(tmp_path / "wild", tmp_path)
    assert [row.image_id for row in made.dataset.rows] == ["x/0.png", "x/1.png"]
    assert [one.reason for one in made.rejected] == [f"{error.__name__}: a fault of the decoder"]


def test_a_file_of_a_size_that_no_image_has_is_not_read(tmp_path):
    with open(tmp_path / "x.png", "wb") as file:
        file.truncate(1 << 40)  # takes no room on the disk
    for read in (read_rgb, read_mask, original_size):
        with pytest.raises(UnreadableImage, match=f"it has {1 << 40} bytes; an image file may have {MAX_BYTES}"):
            read(tmp_path / "x.png")


def test_a_pipe_is_not_waited_for(tmp_path):
    os.mkfifo(tmp_path / "x.png")
    for read in (read_rgb, read_mask, original_size):
        with pytest.raises(UnreadableImage, match="not a regular file"):
            read(tmp_path / "x.png")


@pytest.mark.parametrize("mode", ["I;16", "RGBA"])
def test_a_huge_image_of_few_bytes_takes_little_more_memory_than_its_pixels_do(tmp_path, mode):
    """64 megapixels, 256 MB as RGB: six times as much where the whole of it is scaled or laid on white at once."""
    Image.new(mode, (8000, 8000)).save(tmp_path / "x.png")
    assert (tmp_path / "x.png").stat().st_size < 300_000
    peak = (
        "import resource, sys; from regvit.data.decoding import read_rgb; before = resource.getrusage(resource.RUSAGE_SELF);"
        "assert read_rgb(sys.argv[1]).size == (8000, 8000);"
        "print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before.ru_maxrss)"
    )
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", peak, tmp_path / "x.png"], capture_output=True, text=True, check=True
    )
    assert int(done.stdout) * 1024 < 850_000_000


# Places that cannot be read.


@contextlib.contextmanager
def as_nobody():
    """A folder of a user without rights, who one is inside of the block (who already is none stays what he is)."""
    folder, root = Path(tempfile.mkdtemp()), os.geteuid() == 0
    try:
        if root:
            os.chown(folder, 65534, 65534)
            os.seteuid(65534)
        yield folder
    finally:
        if root:
            os.seteuid(0)
        for path in folder.rglob("*"):
            if not path.is_symlink():
                path.chmod(0o700)
        shutil.rmtree(folder)


def test_what_may_not_be_read_is_rejected_with_the_reason():
    with as_nobody() as folder:
        (folder / "wild/x").mkdir(parents=True)
        for i in range(3):
            noise().save(folder / f"wild/x/{i}.png")
        (folder / "wild/x/1.png").chmod(0)
        (folder / "wild/x/gone.png").symlink_to(folder / "nowhere.png")
        (folder / "wild/x/circle.png").symlink_to(folder / "wild/x/circle.png")
        (folder / "wild/x/folder.png").mkdir()
        made = made_of(folder / "wild", folder)
        assert [row.image_id for row in made.dataset.rows] == ["x/0.png", "x/2.png"]
        reasons = {one.path: one.reason for one in made.rejected}
        assert reasons == {
            "x/1.png": "Permission denied",
            "x/circle.png": "Too many levels of symbolic links",
            "x/gone.png": "No such file or directory",
        }


def test_a_name_that_is_not_utf8_is_rejected_and_listed(tmp_path):
    (tmp_path / "wild/x").mkdir(parents=True)
    noise().save(tmp_path / "wild/x/good.png")
    with open(os.fsencode(tmp_path) + b"/wild/x/caf\xe9.png", "wb") as file:
        file.write(encoded(noise(), "PNG"))
    made = made_of(tmp_path / "wild", tmp_path)
    assert [one.reason for one in made.rejected] == [
        "its path has a backslash, a control character, or bytes that are not UTF-8; rename it"
    ]
    assert "caf" in (tmp_path / "data/wild/rejected.csv").read_text()


# No image silently changes its row.


def vit():
    import timm

    torch.manual_seed(0)
    model = timm.create_model("test_vit", pretrained=False, img_size=32, num_classes=0).eval().requires_grad_(False)
    return Backbone("test_vit", model, TRANSFORM, "w" * 64, None, {"architecture": "test_vit"})


def features_by_image(dataset, folder):
    """CLS of each image, by the image's id."""
    backbone = vit()
    extract(folder / "x.zarr", backbone, dataset, options=Options(batch_size=1))
    store = FeatureStore.open(folder / "x.zarr", dataset.digest)
    return dict(zip([row.image_id for row in dataset.rows], store.read("cls"), strict=True))


def test_no_image_silently_changes_its_row_when_others_are_rejected(tmp_path):
    good = tmp_path / "good/x"
    good.mkdir(parents=True)
    for i in range(6):
        noise(seed=i).save(good / f"{i:02}.png")
    alone = features_by_image(made_of(good.parent, tmp_path / "alone").dataset, tmp_path / "alone")

    mixed = tmp_path / "mixed/x"
    shutil.copytree(good, mixed)
    for i, (content, _) in enumerate(REFUSED[name] for name in sorted(REFUSED) if name != "text_bomb.png"):
        (mixed / f"{i % 6:02}a{i}.png").write_bytes(content())  # between the good ones
    made = made_of(mixed.parent, tmp_path / "among")
    assert len(made.rejected) == len(REFUSED) - 1
    among = features_by_image(made.dataset, tmp_path / "among")
    assert among.keys() == alone.keys()
    for image_id, features in alone.items():
        np.testing.assert_array_equal(among[image_id], features)
    for row in made.dataset.rows:  # the id, the file and its digest are of one image
        content = (good.parent / row.path).read_bytes()
        assert row.image_id == row.path and row.sha256 == hashlib.sha256(content).hexdigest()


def test_an_image_that_breaks_after_the_download_stops_the_extraction_and_does_not_shift_the_rest(tmp_path):
    (tmp_path / "good/x").mkdir(parents=True)
    for i in range(4):
        noise(seed=i).save(tmp_path / f"good/x/{i}.png")
    dataset = made_of(tmp_path / "good", tmp_path).dataset
    whole = (tmp_path / "good/x/1.png").read_bytes()
    (tmp_path / "good/x/1.png").write_bytes(whole[:-300])
    with pytest.raises(UnreadableImage, match=r"x/1\.png is not the file that the data set was made of"):
        features_by_image(dataset, tmp_path)
    assert not (tmp_path / "x.zarr").exists()
    (tmp_path / "good/x/1.png").unlink()
    with pytest.raises(UnreadableImage, match=r"x/1\.png cannot be read as an image: No such file"):
        features_by_image(dataset, tmp_path)
    (tmp_path / "good/x/1.png").write_bytes(whole)
    assert list(features_by_image(dataset, tmp_path)) == ["x/0.png", "x/1.png", "x/2.png", "x/3.png"]


def test_a_source_that_vanished_after_the_download_is_named(tmp_path):
    (tmp_path / "good/x").mkdir(parents=True)
    noise().save(tmp_path / "good/x/1.png")
    made_of(tmp_path / "good", tmp_path)
    shutil.rmtree(tmp_path / "good")
    with pytest.raises(
        FileNotFoundError, match=r"good, the image folder of data set 'wild', does not exist; put it back"
    ):
        read_dataset(tmp_path / "data/wild")
    with pytest.raises(
        FileNotFoundError, match=r"good, the folder of source 'folder:.*' does not exist|does not exist; give"
    ):
        made_of(tmp_path / "good", tmp_path)
    assert (tmp_path / "data/wild/manifest.csv").exists()  # the data set that was there is not lost


@pytest.mark.parametrize(("policy", "share"), [("fail", 1.0), ("reject", 0.3)])
def test_too_many_broken_images_stop_it_and_leave_the_data_set_that_was_there(tmp_path, policy, share):
    (tmp_path / "wild/x").mkdir(parents=True)
    for i in range(2):
        noise(seed=i).save(tmp_path / f"wild/x/{i}.png")
    before = made_of(tmp_path / "wild", tmp_path).dataset.digest
    for i in range(2):
        (tmp_path / f"wild/x/bad{i}.png").touch()
    with pytest.raises(TooManyRejects, match="empty file"):
        made_of(tmp_path / "wild", tmp_path, rejects=policy, max_rejects=share)
    assert read_dataset(tmp_path / "data/wild").digest == before
    assert not [path for path in (tmp_path / "data").iterdir() if path.name != "wild"]


def test_reading_an_image_that_declares_more_than_it_holds_takes_little_memory(tmp_path):
    """A BMP whose header says 10,000 × 10,000 px and that ends there: nothing is made of that size but refused."""
    content = bytearray(encoded(noise(8, 8), "BMP"))
    content[18:26] = (10_000).to_bytes(4, "little") * 2
    (tmp_path / "x.bmp").write_bytes(bytes(content))
    tracemalloc.start()
    with pytest.raises(UnreadableImage):
        read_rgb(tmp_path / "x.bmp")
    assert tracemalloc.get_traced_memory()[1] < 50_000_000
    tracemalloc.stop()
