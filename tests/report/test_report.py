"""The page loads nothing, obeys no name, and its bytes depend on what is in it alone."""

import base64
import io
import re
from html.parser import HTMLParser

import numpy as np
import pytest
from PIL import Image
from report_example import NAME

from regvit.report.compare import Check, Table
from regvit.report.page import (
    LONG,
    MOST_PANES,
    SMALLEST_PICTURE,
    Section,
    Shown,
    check_list,
    code,
    definitions,
    figures,
    page,
    paragraph,
    picture,
    pictures,
    table,
    toggle,
)


class Parsed(HTMLParser):
    """Addresses that a page would load, tags still open at the end, identifiers, and handlers in attributes."""

    VOID = frozenset({"meta", "br", "img", "input"})

    def __init__(self, text: str):
        super().__init__()
        self.addresses, self.open, self.scripts, self.ids, self.handlers, self.text = [], [], 0, [], [], ""
        self.feed(text)

    def handle_starttag(self, tag, attributes):
        self.handle_startendtag(tag, attributes)
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attributes):
        self.scripts += tag == "script"
        for name, value in attributes:
            loads = name in ("src", "xlink:href", "srcset", "data") or (name == "href" and tag != "a")
            if loads and not value.startswith(("#", "data:image/")):
                self.addresses.append(value)
            if name == "id":
                self.ids.append(value)
            if name.startswith("on"):
                self.handlers.append(name)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.text += data


def check_page(text: str) -> Parsed:
    """A page is well-formed, loads nothing and runs no script but its own."""
    parsed = Parsed(text)
    assert parsed.open == []
    assert parsed.addresses == []
    assert parsed.handlers == []
    assert parsed.scripts == 1
    assert len(parsed.ids) == len(set(parsed.ids))
    assert "@import" not in text
    assert not re.search(r"url\((?!#)", text)
    return parsed


def whole_page() -> str:
    sections = [
        Section(NAME, table(Table(NAME, ("run", NAME), ((NAME, "1"),), NAME))),
        Section("checks", check_list([Check(NAME, "cosine", 0.5, 0.9, 1)])),
        Section("toggle", toggle("key", NAME, [(NAME, paragraph(NAME)), ("b", code(NAME))])),
        Section("words", definitions([(NAME, NAME)]) + figures([(NAME, "<svg></svg>")])),
        Section("nothing", ""),
    ]
    return page(NAME, paragraph(NAME), sections)


def test_the_page_loads_nothing_and_is_well_formed():
    check_page(whole_page())


def test_names_are_shown_and_never_obeyed():
    assert (
        check_page(whole_page()).text.count("alert(") == 3 + 2 + 4 + 1 + 3 + 2 + 1
    )  # page, section, table, check, toggle, words, caption
    assert '<script>alert("a")' not in whole_page()


def test_the_bytes_are_the_same_each_time():
    assert whole_page() == whole_page()
    assert not re.search(r"20\d\d-\d\d-\d\d", whole_page())


def test_a_section_without_content_is_left_out_and_the_others_are_in_the_contents():
    assert "nothing" not in whole_page()
    assert whole_page().count('<li><a href="#part-') == 4
    for place in re.findall(r'<li><a href="#([^"]+)"', whole_page()):
        assert f'<section id="{place}">' in whole_page()


def test_a_failed_check_stands_out():
    assert '<li class="fail">FAIL  run: cosine 0.5 (≥ 0.9)</li>' in check_list([Check("run", "cosine", 0.5, 0.9, 1)])
    assert "no ground truth" in check_list([])


def test_figures_and_intervals_stand_in_columns_of_their_own():
    content = Table("t", ("run", "top-1", "n"), (("a", "62.2 [57.5–66.6] ▼", "436"), ("b", "–", "–")), "Read `this`.")
    html = table(content)
    assert '<th scope="col" class="t" colspan=2>top-1</th>' in html
    assert '<td class="v">62.2</td><td class="i">[57.5–66.6] <span class="down">▼</span></td>' in html
    assert '<td class="v">–</td><td class="i"></td>' in html
    assert '<td class="n">436</td>' in html
    assert '<p class="note">Read <code>this</code>.</p>' in html
    cells = [len(re.findall("<td", row)) for row in re.findall(r"<tr><th scope=\"row\">.*", html)]
    assert cells == [3, 3]


def test_differences_have_columns_too():
    html = table(Table("t", ("what", "difference"), (("a", "+1.2 [−0.3, +2.7] ▲"), ("b", "±0.0 [±0.0, ±0.0]"))))
    assert '<td class="v">+1.2</td><td class="i">[−0.3, +2.7] <span class="up">▲</span></td>' in html
    assert '<td class="v">±0.0</td><td class="i">[±0.0, ±0.0]</td>' in html


def test_rows_of_one_run_belong_together_and_a_table_without_rows_is_nothing():
    html = table(Table("t", ("run", "x"), (("a", "1"), ("a", "2"), ("b", "3"))))
    assert re.findall(r'<tr class="(\w+)"', html) == ["first", "again", "first"]
    assert 'class="first"' not in table(Table("t", ("run", "x"), (("a", "1"), ("b", "2"))))
    assert table(Table("t", ("run",), (), "note")) == ""


def test_a_long_table_is_folded_unless_it_is_the_section_itself():
    long = Table("t", ("run", "x"), tuple((str(i), "1") for i in range(LONG + 1)))
    assert f"<summary>{LONG + 1} rows</summary>" in table(long)
    assert "<summary>" not in table(long, titled=False)
    assert "<summary>" not in table(Table("t", long.header, long.rows[1:]))


def test_one_pane_needs_no_choice_and_more_than_there_is_room_for_are_named():
    assert "<input" not in toggle("key", "run", [("a", "x")])
    assert toggle("key", "run", []) == ""
    many = toggle("key", "run", [(f"run {i}", "x") for i in range(MOST_PANES + 2)], chosen=1)
    assert many.count("<input") == MOST_PANES
    assert re.findall(r'id="(key-\d+)" checked', many) == ["key-1"]
    assert f"run {MOST_PANES}, run {MOST_PANES + 1}" in many


def noise(path, size=(300, 200)):
    pixels = np.random.default_rng(0).integers(0, 255, (size[1], size[0], 3), dtype=np.uint8)
    Image.fromarray(pixels).save(path)
    return path


def embedded(html: str) -> Image.Image:
    return Image.open(io.BytesIO(base64.b64decode(re.search(r"base64,([^\"]+)", html)[1])))


def test_a_picture_lies_inside_the_page_at_its_size(tmp_path):
    Image.new("RGB", (20, 10), "red").save(tmp_path / "a.png")
    html = picture(tmp_path / "a.png", 'a "b"', 9000)
    assert 'alt="a &quot;b&quot;"' in html
    assert 'width="20" height="10"' in html
    assert embedded(html).size == (20, 10)
    red, green, blue = embedded(html).convert("RGB").getpixel((5, 5))
    assert red > 240 and green < 15 and blue < 15


@pytest.mark.parametrize("limit", [30_000, 9_000, 1])
def test_a_picture_is_as_good_as_its_bytes_allow_but_never_nothing(tmp_path, limit):
    html = picture(noise(tmp_path / "a.png"), "noise", limit)
    size = len(base64.b64decode(re.search(r"base64,([^\"]+)", html)[1]))
    assert size <= max(limit, SMALLEST_PICTURE)
    assert 'width="300" height="200"' in html  # the place that it takes does not depend on the bytes
    assert html == picture(tmp_path / "a.png", "noise", limit)


def test_a_picture_lies_over_that_of_the_reference_where_both_are_of_one_size(tmp_path):
    small, same, other = noise(tmp_path / "a.png", (30, 20)), noise(tmp_path / "b.png"), noise(tmp_path / "c.png")
    shown = [
        Shown("a", small, "x"),
        Shown("b", same, "x", "a"),
        Shown("c", other, "x", "b"),
        Shown("d", same, "x", "gone"),
    ]
    html = pictures("key", "run", shown, 9_000)
    assert re.findall(r'data-name="(\w)" data-under="([^"]+)"', html) == [("c", "key-1-picture")]
    assert html.count("<img") == 4
