"""The report in a real browser: nothing breaks or overflows on a phone or a laptop, and it is usable by keyboard."""

import os
from pathlib import Path

import pytest
from browser import Browser, find_chromium
from PIL import Image

CHROMIUM = find_chromium()
pytestmark = pytest.mark.skipif(
    CHROMIUM is None, reason="no Chromium: install one (apt-get install chromium), or name it in CHROMIUM"
)
SIZES = [(width, dark) for width in (360, 1440) for dark in (False, True)]
CONTRAST = """(() => {
  const parse = (text) => text.match(/[\\d.]+/g).map(Number);
  const light = (rgb) => {
    const [r, g, b] = rgb.map((v) => (v /= 255) <= 0.04045 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4);
    return 0.2126 * r + 0.7152 * g + 0.0722 * b;
  };
  const under = (element) => {
    for (let each = element; each; each = each.parentElement) {
      const colour = parse(getComputedStyle(each).backgroundColor);
      if (colour.length === 3 || colour[3] > 0.99) return colour.slice(0, 3);
    }
    return [255, 255, 255];
  };
  let worst = [99, ""];
  for (const element of document.querySelectorAll("h1, h2, h3, p, td, th, li, dt, dd, a, label, figcaption, code, summary")) {
    if (!element.checkVisibility() || !element.textContent.trim()) continue;
    const a = light(parse(getComputedStyle(element).color).slice(0, 3)), b = light(under(element));
    const ratio = (Math.max(a, b) + 0.05) / (Math.min(a, b) + 0.05);
    if (ratio < worst[0]) worst = [ratio, element.outerHTML.slice(0, 120)];
  }
  return worst;
})()"""


@pytest.fixture(scope="module")
def browser():
    with Browser(CHROMIUM) as found:
        yield found


@pytest.fixture(scope="module")
def file(tmp_path_factory, page):
    path = tmp_path_factory.mktemp("page") / "report.html"
    path.write_text(page, encoding="utf-8")
    return path


@pytest.fixture(params=SIZES, ids=[f"{width}-{'dark' if dark else 'light'}" for width, dark in SIZES])
def opened(browser, file, request):
    browser.open(file, *request.param)
    return browser


def focus_by_tab(browser: Browser, selector: str, most: int = 120) -> None:
    """Presses Tab until an element has the focus; fails if it is never reached."""
    for _ in range(most):
        browser.press("Tab")
        if browser.evaluate(f"document.activeElement.matches({selector!r})"):
            return
    raise AssertionError(f"{selector} was not reached by {most} presses of Tab")


def test_the_page_says_nothing_to_the_console_and_asks_for_nothing(opened):
    assert opened.errors() == []
    assert opened.requested() == []


def test_no_name_in_it_was_obeyed(opened):
    assert opened.evaluate("document.scripts.length") == 1
    assert opened.evaluate("document.body.textContent.includes('<script>alert')")


def test_every_picture_is_loaded(opened):
    loaded = opened.evaluate(
        "Promise.all([...document.querySelectorAll('.pane img')].map((image) => image.decode().then(() => image.naturalWidth > 0)))"
    )
    # of two images, in four panes of which one has no slider; and two galleries of three runs, two of them over another
    assert len(loaded) == 2 * (4 + 3 + 3 * 6) + 2 * (3 + 2)
    assert all(loaded)


def test_nothing_sticks_out_of_the_window(opened):
    assert opened.evaluate("document.documentElement.scrollWidth - document.documentElement.clientWidth") == 0


def test_plots_have_a_size_and_stay_inside_their_place(opened):
    sizes = opened.evaluate(
        "[...document.querySelectorAll('.plots img')].map((s) => [s.clientWidth, s.parentElement.clientWidth])"
    )
    assert len(sizes) > 10
    assert all(100 < width <= place for width, place in sizes)


def test_text_stands_out_from_what_is_under_it(opened):
    ratio, element = opened.evaluate(CONTRAST)
    assert ratio >= 4.5, element  # WCAG 2.2 AA


@pytest.mark.parametrize("width", [360, 1440])
def test_light_and_dark_differ(browser, file, width):
    seen = []
    for dark in (False, True):
        browser.open(file, width, dark)
        seen.append(browser.evaluate("getComputedStyle(document.body).backgroundColor"))
    assert seen[0] == "rgb(255, 255, 255)" != seen[1]


@pytest.mark.parametrize("dark", [False, True])
def test_the_text_of_plots_is_light_in_the_dark_and_dark_in_the_light(browser, file, tmp_path, dark):
    browser.open(file, 1440, dark)
    box = browser.evaluate("document.querySelector('.plots img').getBoundingClientRect().toJSON()")
    browser.screenshot(tmp_path / "plot.png", *(box[name] for name in ("x", "y", "width", "height")))
    shades = Image.open(tmp_path / "plot.png").convert("L").getextrema()
    assert shades[1] > 200 > 60 > shades[0]
    corner = Image.open(tmp_path / "plot.png").convert("L").getpixel((2, 2))
    assert (corner < 60) is dark


def test_a_run_is_chosen_by_tab_and_arrow(opened):
    shown = "[0, 1, 2].map((i) => document.getElementById(`attention-scenes-${i}-picture`).checkVisibility())"
    assert opened.evaluate(shown) == [False, False, True]
    focus_by_tab(opened, "input[name=attention-scenes]")
    assert opened.evaluate("document.activeElement.id") == "attention-scenes-2"
    ring = "getComputedStyle(document.querySelector('label[for=attention-scenes-2]')).outlineStyle"
    assert opened.evaluate(ring) == "solid"  # it is seen where the focus is
    opened.press("ArrowLeft")
    assert opened.evaluate("document.activeElement.id") == "attention-scenes-1"
    assert opened.evaluate(shown) == [False, True, False]


CLIPS = """[...document.querySelectorAll('.sheet')].filter((s) => s.checkVisibility())[0].querySelectorAll('.wipe img + img')"""


def test_all_maps_of_the_images_are_moved_by_one_slider(opened):
    clips = f"[...{CLIPS}].map((image) => getComputedStyle(image).clipPath)"
    assert opened.evaluate(clips) == ["inset(0px 0px 0px 50%)"] * 6  # three maps of two images
    focus_by_tab(opened, "input[type=range]")
    opened.press("ArrowLeft")
    assert opened.evaluate(clips) == ["inset(0px 0px 0px 49%)"] * 6
    opened.press("Home")
    assert set(opened.evaluate(clips)) <= {"inset(0px)", "inset(0px 0px 0px 0%)"}  # two ways of saying it
    label = opened.evaluate("document.activeElement.getAttribute('aria-label')")
    assert label.startswith("how far original covers ")


def test_the_line_is_dragged_by_the_mouse_and_the_slider_follows(browser, file):
    browser.open(file, 1440, False)
    browser.evaluate(f"{CLIPS}[0].scrollIntoView({{block: 'center'}})")
    box = browser.evaluate(f"{CLIPS}[0].getBoundingClientRect().toJSON()")
    y = box["top"] + box["height"] / 2
    for kind, share, buttons in (
        ("mousePressed", 0.5, 1),
        ("mouseMoved", 0.6, 1),
        ("mouseMoved", 0.8, 1),
        ("mouseReleased", 0.8, 0),
    ):
        at = {"x": box["left"] + share * box["width"], "y": y}
        browser.call("Input.dispatchMouseEvent", type=kind, button="left", buttons=buttons, clickCount=1, **at)
    value = (
        "[...document.querySelectorAll('.sheet')].filter((s) => s.checkVisibility())[0].querySelector('input').value"
    )
    assert 78 <= int(browser.evaluate(value)) <= 82
    at = {"x": box["left"] + 0.1 * box["width"], "y": y}
    browser.call("Input.dispatchMouseEvent", type="mouseMoved", button="none", buttons=0, **at)
    assert 78 <= int(browser.evaluate(value)) <= 82  # let go, it stays


def test_maps_are_drawn_patch_by_patch_and_lie_exactly_over_each_other(opened):
    assert opened.evaluate(f"getComputedStyle({CLIPS}[0]).imageRendering") == "pixelated"
    boxes = f"[...{CLIPS}].map((image) => [image, image.previousSibling].map((i) => JSON.stringify(i.getBoundingClientRect())))"
    assert all(over == under for over, under in opened.evaluate(boxes))


def test_on_a_phone_a_row_of_the_first_table_is_a_block_with_a_line_a_run(browser, file):
    browser.open(file, 360, False)
    assert browser.evaluate(
        "document.querySelector('.stack').scrollWidth <= document.querySelector('.stack').clientWidth"
    )
    said = "getComputedStyle(document.querySelector('.stack td.v:not(.none)'), '::before').content"
    assert browser.evaluate(said) == '"original"'
    browser.open(file, 1440, False)
    assert browser.evaluate(said) == "none"


PARTS = (
    "[...document.querySelectorAll('section')].map((s) => [s.id, ...Object.values(s.getBoundingClientRect().toJSON())])"
)


@pytest.mark.parametrize(("width", "dark"), SIZES)
def test_a_tour_of_screenshots_is_left(browser, tmp_path, file, width, dark):
    """A picture a section, in REGVIT_TOUR where that names a folder (of REGVIT_TOUR_PAGE, else of the small example)."""
    folder = Path(os.environ.get("REGVIT_TOUR", tmp_path)) / f"{width}-{'dark' if dark else 'light'}"
    folder.mkdir(parents=True, exist_ok=True)
    page = Path(os.environ.get("REGVIT_TOUR_PAGE", file))
    browser.open(page, width, dark)
    assert browser.errors() == []
    parts = browser.evaluate(PARTS)
    for name, x, y, wide, high, *_ in parts:
        browser.screenshot(folder / f"{name}.png", x, y, wide, min(high, 6000))
    pictures = [Image.open(path) for path in folder.glob("part-*.png")]
    assert len(pictures) == len(parts) > 5
    assert all(picture.width <= width for picture in pictures)
    assert all(
        max(picture.convert("L").getextrema()) - min(picture.convert("L").getextrema()) > 100 for picture in pictures
    )


def test_one_picture_is_moved_over_the_other_by_keyboard(opened):
    focus_by_tab(opened, "input[name=discover-scenes]")
    opened.press("Tab")
    assert opened.evaluate("document.activeElement.type") == "range"
    clip = "getComputedStyle(document.activeElement.closest('.pane').querySelector('.wipe img + img')).clipPath"
    assert opened.evaluate(clip) == "inset(0px 0px 0px 50%)"
    opened.press("ArrowRight")
    assert opened.evaluate(clip) == "inset(0px 0px 0px 51%)"
    opened.press("End")
    assert opened.evaluate(clip) == "inset(0px 0px 0px 100%)"
    boxes = "[...document.activeElement.closest('.pane').querySelectorAll('.wipe img')].map((i) => JSON.stringify(i.getBoundingClientRect()))"
    assert len(set(opened.evaluate(boxes))) == 1  # they lie exactly over each other
    assert "original" in opened.evaluate("document.activeElement.getAttribute('aria-label')")


def test_a_section_is_closed_and_opened_by_keyboard(opened):
    focus_by_tab(opened, "section summary")
    for expected in (False, True):
        opened.press("Enter")
        assert opened.evaluate("document.activeElement.parentElement.open") is expected


@pytest.mark.parametrize(("width", "open_"), [(360, False), (1440, True)])
def test_the_contents_are_folded_where_there_is_no_room_and_stay_in_sight_where_there_is(browser, file, width, open_):
    browser.open(file, width, False)
    assert browser.evaluate("document.querySelector('nav details').open") is open_
    browser.evaluate("window.scrollTo(0, 3000)")
    top = browser.evaluate("document.querySelector('nav').getBoundingClientRect().top")
    assert (top >= 0) is open_


def test_a_link_of_the_contents_opens_the_closed_section_that_it_leads_to(browser, file):
    browser.open(file, 1440, False)
    last = "[...document.querySelectorAll('section details')].at(-1)"
    browser.evaluate(f"{last}.open = false")
    browser.evaluate("[...document.querySelectorAll('nav a')].at(-1).click()")
    browser.evaluate("new Promise((done) => setTimeout(done, 100))")
    assert browser.evaluate(f"{last}.open")


def test_wide_tables_are_scrolled_by_keyboard(browser, file):
    browser.open(file, 360, False)
    focus_by_tab(browser, ".wide:not(.stack)")
    assert browser.evaluate("document.activeElement.scrollWidth > document.activeElement.clientWidth")
    browser.press("ArrowRight")
    browser.evaluate("new Promise((done) => setTimeout(done, 400))")
    assert browser.evaluate("document.activeElement.scrollLeft") > 0
