import io
import json
from collections.abc import Iterable

import numpy as np
import pytest
from fontTools.feaLib.builder import addOpenTypeFeaturesFromString
from fontTools.fontBuilder import FontBuilder
from fontTools.pens.ttGlyphPen import TTGlyphPen
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from regvit.data.synthetic.emoji import (
    EmojiFont,
    by_key,
    canonical,
    codepoints,
    identities,
    is_blank,
    line_art,
    render_svg,
)

DRAWING = """<svg id="emoji" viewBox="0 0 72 72" xmlns="http://www.w3.org/2000/svg">
  <g id="color"><rect x="0" y="0" width="36" height="72" fill="#ff0000"/></g>
  <g id="line"><rect x="36" y="0" width="18" height="72"/></g>
  <g id="line-supplement"><rect x="54" y="0" width="18" height="36"/></g>
</svg>"""
BLACK, RED, WHITE = [0, 0, 0], [255, 0, 0], [255, 255, 255]


@settings(deadline=None)  # a busy machine is no fault
@given(st.lists(st.integers(1, 0x10FFFF).filter(lambda point: point != 0xFE0F), min_size=1, max_size=5))
def test_keys_ignore_case_padding_and_variation_selectors(points):
    padded = "-FE0F-".join(f"{point:04X}" for point in points)
    plain = "-".join(f"{point:x}" for point in points)
    assert canonical(padded) == canonical(plain) == plain


def test_only_files_of_the_folder_itself_with_the_suffix_are_keyed():
    names = ["p/svg/1F436.svg", "p/svg/1F436.svg.gz", "p/svg/old/1F437.svg", "p/1F438.svg", "p/svg/00A9.svg"]
    assert by_key(names, "p/svg/", ".svg") == {"1f436": "p/svg/1F436.svg", "a9": "p/svg/00A9.svg"}


def test_identities_are_those_of_the_groups_sorted_by_key():
    table = [
        {"unified": "1F436", "category": "Animals & Nature", "subcategory": "animal-mammal"},
        {"unified": "1F1E6-1F1FA", "category": "Flags", "subcategory": "country-flag"},
        {"unified": "00A9-FE0F", "category": "Symbols", "subcategory": "other-symbol"},
    ]
    found = identities(json.dumps(table).encode())
    assert [(one.key, one.group) for one in found] == [("1f436", "Animals & Nature"), ("a9", "Symbols")]
    flags = identities(json.dumps(table).encode(), ["Flags"])
    assert [(codepoints(one.key), one.subgroup) for one in flags] == [((0x1F1E6, 0x1F1FA), "country-flag")]


def test_a_drawing_is_rendered_on_white():
    pixels = np.asarray(render_svg(DRAWING, 4))
    assert pixels[0].tolist() == [RED, RED, BLACK, BLACK]
    assert pixels[3].tolist() == [RED, RED, BLACK, WHITE]


def test_line_art_keeps_the_line_layers_and_nothing_else():
    pixels = np.asarray(render_svg(line_art(DRAWING), 4))
    assert pixels[0].tolist() == [WHITE, WHITE, BLACK, BLACK]
    assert pixels[3].tolist() == [WHITE, WHITE, BLACK, WHITE]


def test_a_drawing_without_lines_is_refused():
    with pytest.raises(ValueError, match=r"no line layer among \['color'\]; expected one of line, line-supplement"):
        line_art('<svg xmlns="http://www.w3.org/2000/svg"><g id="color"/></svg>')


def test_one_colour_is_blank_and_two_are_not():
    image = Image.new("RGB", (3, 3), (7, 8, 9))
    assert is_blank(image)
    image.putpixel((1, 1), (7, 8, 10))
    assert not is_blank(image)


def tiny_font(characters: Iterable[int]) -> bytes:
    """Units per em 100, line from -20 to 80: characters fill the lower half of the line, a ligature of two the left half."""

    def box(x0, y0, x1, y1):
        pen = TTGlyphPen(None)
        pen.moveTo((x0, y0))
        for point in ((x0, y1), (x1, y1), (x1, y0)):
            pen.lineTo(point)
        pen.closePath()
        return pen.glyph()

    glyphs = {
        "a": box(0, -20, 100, 30),
        "ab": box(0, -20, 50, 80),
        ".notdef": box(0, 0, 1, 1),
        "joiner": box(0, 0, 1, 1),
    }
    builder = FontBuilder(100, isTTF=True)
    builder.setupGlyphOrder([".notdef", "a", "joiner", "ab"])
    builder.setupCharacterMap(dict.fromkeys(characters, "a") | {0x200D: "joiner"})
    builder.setupGlyf(glyphs)
    builder.setupHorizontalMetrics(dict.fromkeys(glyphs, (100, 0)))
    builder.setupHorizontalHeader(ascent=80, descent=-20)
    builder.setupNameTable({"familyName": "Tiny", "styleName": "Regular"})
    builder.setupPost()
    addOpenTypeFeaturesFromString(builder.font, "feature ccmp { sub a joiner a by ab; } ccmp;")
    content = io.BytesIO()
    builder.font.save(content)
    return content.getvalue()


@pytest.fixture(scope="module")
def font() -> EmojiFont:
    return EmojiFont(tiny_font([0x61]))


def test_a_glyph_is_drawn_upright_in_a_square_around_its_line(font):
    assert np.asarray(render_svg(font.svg((0x61,)), 2)).tolist() == [[WHITE, WHITE], [BLACK, BLACK]]


def test_a_sequence_is_drawn_by_its_ligature(font):
    assert font.glyph((0x61, 0x200D, 0x61)) == "ab"
    assert np.asarray(render_svg(font.svg((0x61, 0x200D, 0x61)), 2)).tolist() == [[BLACK, WHITE], [BLACK, WHITE]]


def test_what_the_font_lacks_has_no_drawing(font):
    assert font.svg((0x62,)) is None
    assert font.svg((0x61, 0x61)) is None
