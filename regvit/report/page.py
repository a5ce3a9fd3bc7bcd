"""One HTML page about the runs: tables, self-checks, plots and pictures, with nothing to load, in light and dark.

The bytes depend on the metrics alone: no date, no random identifier, no version. Every text that comes in is escaped. The
page reads without its script, which only opens the table of contents where there is room, opens a section that a link
leads to, and lets one picture be drawn over another. How it looks is in `report_style`.
"""

from __future__ import annotations

import base64
import html
import io
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from PIL import Image

from regvit.report.compare import Check, Table
from regvit.report.style import CSS, MOST_PANES, PAGE, SCRIPT

LONG = 24  # rows
LARGE = 700  # pixels of width
SMALLEST_PICTURE = 6_000  # bytes: below, nothing is to be seen
QUALITIES = (25, 40, 55, 70, 82)
CELL = re.compile(r"(\S+)\s+(\[[^\]]*\])(?:\s+([▲▼]))?")
NUMBER = re.compile(r"[+−±]?\d[\d.–]*")


@dataclass(frozen=True)
class Section:
    """A part of the page: its heading as plain text, and its content as HTML (of the functions below)."""

    title: str
    content: str


@dataclass(frozen=True)
class Shown:
    """A picture of the same images in one run.

    Args:
        name: of the run.
        path: of the PNG.
        alternative: what there is to be seen, in words.
        reference: name of the run whose picture lies under this one, if any.
    """

    name: str
    path: Path
    alternative: str
    reference: str | None = None


def page(title: str, lead: str, sections: Sequence[Section]) -> str:
    """The page.

    Args:
        title: plain text.
        lead: HTML below the title.
        sections: those without content are left out.
    """
    sections = [section for section in sections if section.content]
    places = [f"part-{i}-{slug(section.title)}" for i, section in enumerate(sections)]
    contents = "\n".join(
        f'<li><a href="#{place}">{html.escape(section.title)}</a></li>'
        for place, section in zip(places, sections, strict=True)
    )
    body = "\n".join(
        f'<section id="{place}"><details open><summary><h2>{html.escape(section.title)}</h2></summary>\n'
        f"{section.content}\n</details></section>"
        for place, section in zip(places, sections, strict=True)
    )
    return PAGE.format(
        title=html.escape(title), css=CSS, contents=contents, lead=lead, body=body, script=SCRIPT
    )  # what is put in is not formatted again


def slug(text: str) -> str:
    """Letters, digits and - only, for identifiers."""
    return re.sub(r"[^a-z0-9]+", "-", text.lower()).strip("-")


def paragraph(text: str, kind: str = "lead") -> str:
    """A paragraph of plain text, in which `…` is code; nothing for no text."""
    return f'<p class="{kind}">{_prose(text)}</p>' if text else ""


def heading(text: str) -> str:
    """A heading inside a section."""
    return f"<h3>{html.escape(text)}</h3>"


def code(text: str) -> str:
    """Lines to be copied into a terminal."""
    return f"<pre><code>{html.escape(text)}</code></pre>"


def definitions(words: Sequence[tuple[str, str]]) -> str:
    """Words and what they mean, as plain text."""
    rows = (f"<dt>{html.escape(word)}</dt><dd>{_prose(meaning)}</dd>" for word, meaning in words)
    return "<dl>\n" + "\n".join(rows) + "\n</dl>"


def table(content: Table, titled: bool = True, stacked: bool = False) -> str:
    """A table with its title above and its note below; nothing where it has no rows.

    One with a title and many rows is folded. Figures stand right, each interval in a column of its own beside them; the
    mark of a difference has its colour.

    Args:
        stacked: on a phone, each row becomes a block with a line a column, instead of scrolling sideways.
    """
    if not content.rows:
        return ""
    split = [any(CELL.fullmatch(row[i].strip()) for row in content.rows) for i in range(len(content.header))]
    number = [any(NUMBER.fullmatch(row[i].strip()) for row in content.rows) for i in range(len(content.header))]
    head = "".join(
        f'<th scope="col" class="{"n" if number[i] and not split[i] else "t"}"{" colspan=2" if split[i] else ""}>'
        f"{html.escape(cell)}</th>"
        for i, cell in enumerate(content.header)
    )
    lines, before = [], None
    repeats = len({row[0] for row in content.rows}) < len(content.rows)
    for row in content.rows:
        again = row[0] == before
        kind = f' class="{"again" if again else "first"}"' if repeats else ""
        of = content.header[1:] if stacked else [""] * len(row)
        cells = "".join(_cells(cell, split[i + 1], number[i + 1], of[i]) for i, cell in enumerate(row[1:]))
        lines.append(f'<tr{kind}><th scope="row">{html.escape(row[0])}</th>{cells}</tr>')
        before = row[0]
    label = html.escape(content.title, quote=True)
    body = "\n".join(lines)
    inside = (
        f'<div class="wide{" stack" if stacked else ""}" tabindex="0" role="region" aria-label="{label}"><table>\n<thead><tr>{head}</tr></thead>\n'
        f"<tbody>\n{body}\n</tbody>\n</table></div>{paragraph(content.note, 'note')}"
    )
    if not titled:
        return inside
    if len(lines) > LONG:
        inside = f'<details class="long"><summary>{len(lines)} rows</summary>{inside}</details>'
    return heading(content.title) + inside


def check_list(checks: Sequence[Check]) -> str:
    """The self-checks as HTML, or a sentence that there are none."""
    if not checks:
        return paragraph("No run is on a planted backbone, so there is no ground truth to check against.")
    items = (f'<li class="{"pass" if c.passed else "fail"}">{html.escape(c.text())}</li>' for c in checks)
    return '<ul class="checks">\n' + "\n".join(items) + "\n</ul>"


def figures(content: Sequence[tuple[str, str]]) -> str:
    """Figures side by side: (caption as plain text, SVG or img element); nothing for none."""
    if not content:
        return ""
    each = (f"<figure>{image}<figcaption>{html.escape(caption)}</figcaption></figure>" for caption, image in content)
    return '<div class="plots">\n' + "\n".join(each) + "\n</div>"


def toggle(key: str, label: str, panes: Sequence[tuple[str, str]], chosen: int = 0) -> str:
    """One of several contents at a time, chosen by the mouse, or by Tab and the arrow keys.

    Args:
        key: identifier, once a page.
        label: what is chosen, for those who do not see it.
        panes: (name as plain text, HTML), at most 12: further ones are left out, and the page says so.
        chosen: index of the one that is shown first.
    """
    left_out = [name for name, _ in panes[MOST_PANES:]]
    panes = panes[:MOST_PANES]
    if not panes:
        return ""
    inputs = "".join(
        f'<input type="radio" name="{key}" id="{key}-{i}"{" checked" if i == min(chosen, len(panes) - 1) else ""}>'
        f'<label for="{key}-{i}">{html.escape(name)}</label>'
        for i, (name, _) in enumerate(panes)
    )
    body = "\n".join(f'<div class="pane">{content}</div>' for _, content in panes)
    note = paragraph(f"Not shown for want of room: {', '.join(left_out)}.", "note") if left_out else ""
    inputs = inputs if len(panes) > 1 else ""
    group = f'role="radiogroup" aria-label="{html.escape(label, quote=True)}"'
    return f'<div class="toggle" {group}>\n{inputs}\n<div class="panes">\n{body}\n</div></div>{note}'


def pictures(key: str, label: str, shown: Sequence[Shown], limit: int, chosen: int = 0) -> str:
    """Pictures of the same images by run, one at a time; over that of the run's reference, with a slider, where both are
    of one size.

    Args:
        key: identifier, once a page.
        label: what is chosen, for those who do not see it.
        limit: bytes a picture.
        chosen: index of the one that is shown first.
    """
    sizes = {}
    for each in shown:
        with Image.open(each.path) as image:
            sizes[each.name] = image.size
    place = {each.name: i for i, each in enumerate(shown[:MOST_PANES])}
    panes = []
    for each in shown:
        name = f'id="{key}-{place.get(each.name)}-picture" data-name="{html.escape(each.name, quote=True)}"'
        if each.reference in place and sizes[each.reference] == sizes[each.name]:
            name += f' data-under="{key}-{place[each.reference]}-picture"'
        panes.append((each.name, picture(each.path, each.alternative, limit, name)))
    return toggle(key, label, panes, chosen)


def picture(path: Path, alternative: str, limit: int, attributes: str = "") -> str:
    """A picture inside the page: WebP of the best quality that fits, smaller if none does.

    Args:
        alternative: what is to be seen, in words.
        limit: bytes, at least 6,000.
        attributes: further ones of the element.
    """
    with Image.open(path) as file:
        image = file.convert("RGB")
    width, height = image.size
    data = encode(image, max(limit, SMALLEST_PICTURE))
    alternative = html.escape(alternative, quote=True)
    source = f"data:image/webp;base64,{base64.b64encode(data).decode()}"
    kind = ' class="large"' if width > LARGE else ""  # not shrunk on a phone, but scrolled
    return f'<img{kind} {attributes} src="{source}" width="{width}" height="{height}" alt="{alternative}">'


def encode(image: Image.Image, limit: int) -> bytes:
    """The best quality that fits; a smaller picture where the worst does not."""

    def webp(quality: int) -> bytes:
        file = io.BytesIO()
        image.save(file, "WEBP", quality=quality, method=4)
        return file.getvalue()

    while len(found := webp(QUALITIES[0])) > limit:
        image = image.resize([max(1, round(0.8 * side)) for side in image.size], Image.Resampling.LANCZOS)
    for quality in QUALITIES[1:]:
        better = webp(quality)
        if len(better) > limit:
            break
        found = better
    return found


def _cells(cell: str, split: bool, number: bool, of: str = "") -> str:
    """One table cell, or two where its column has figures with intervals.

    Args:
        of: heading of the column, where the cell is to repeat it.
    """
    text = cell.strip()
    named = f' data-of="{html.escape(of, quote=True)}"' if of else ""
    empty = " none" if of and text == "–" else ""
    if not split:
        return f'<td class="{"n" if number else "t"}{empty}"{named}>{html.escape(text)}</td>'
    if match := CELL.fullmatch(text):
        mark = f' <span class="{"up" if match[3] == "▲" else "down"}">{match[3]}</span>' if match[3] else ""
        value = f'<td class="v"{named}>{html.escape(match[1])}</td>'
        return f'{value}<td class="i">{html.escape(match[2])}{mark}</td>'
    return f'<td class="v{empty}"{named}>{html.escape(text)}</td><td class="i"></td>'


def _prose(text: str) -> str:
    return re.sub("`([^`]+)`", r"<code>\1</code>", html.escape(text))
