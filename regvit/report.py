"""One HTML page about the runs: tables, self-checks, plots and pictures, with nothing to load, in light and dark.

The bytes depend on the metrics alone: no date, no random identifier, no version. Every text that comes in is escaped. The
page reads without its script, which only opens the table of contents where there is room, opens a section that a link
leads to, and lets one picture be drawn over another.
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

from .compare import Check, Table

MOST_PANES = 12
LONG = 24  # rows
LARGE = 700  # pixels of width
SMALLEST_PICTURE = 6_000  # bytes: below, nothing is to be seen
QUALITIES = (25, 40, 55, 70, 82)
CELL = re.compile(r"(\S+)\s+(\[[^\]]*\])(?:\s+([▲▼]))?")
NUMBER = re.compile(r"[+−±]?\d[\d.–]*")

CSS = """
:root {color-scheme: light dark; --ink: #20242a; --soft: #646b76; --page: #ffffff; --line: #e2e5ea; --tint: #f4f6f8;
  --link: #1f5fae; --good: #1b7a4b; --bad: #b3261e}
@media (prefers-color-scheme: dark) {
  :root {--ink: #dfe3e8; --soft: #98a1ad; --page: #14171b; --line: #2c323a; --tint: #1c2026; --link: #86b4f0;
    --good: #6fcf9b; --bad: #ff8a80}
  .pane img, .plate {filter: brightness(.88)}
}
* {box-sizing: border-box}
html {scroll-padding-top: 1rem; -webkit-text-size-adjust: 100%}
body {margin: 0; color: var(--ink); background: var(--page); font: 1rem/1.55 system-ui, -apple-system, "Segoe UI", sans-serif}
a {color: var(--link)}
code {font: .9em/1.4 ui-monospace, SFMono-Regular, Menlo, Consolas, monospace; overflow-wrap: anywhere}
.page {max-width: 90rem; margin: 0 auto; padding: 1.5rem 1rem 5rem}
main {min-width: 0}
header p {max-width: 46rem; color: var(--soft); margin: .3rem 0 1rem}
h1 {font-size: 1.6rem; line-height: 1.25; margin: 0; letter-spacing: -.01em}
h2 {display: inline; font-size: 1.2rem; margin: 0; letter-spacing: -.005em}
h3 {font-size: 1rem; margin: 1.8rem 0 .5rem}
section {border-top: 1px solid var(--line); padding: .3rem 0}
summary {cursor: pointer; padding: .7rem 0}
summary + h3 {margin-top: .3rem}
section[id], h3 {scroll-margin-top: 1rem}
.lead {max-width: 46rem; margin: 0 0 1rem}
.note {max-width: 60rem; margin: .5rem 0 0; font-size: .8125rem; color: var(--soft)}
.wide {overflow-x: auto; margin: .4rem 0}
table {border-collapse: collapse; font-size: .85rem; font-variant-numeric: tabular-nums lining-nums}
th, td {padding: .32rem .7rem .32rem 0; text-align: left; border-bottom: 1px solid var(--line); white-space: nowrap;
  vertical-align: baseline}
thead th {font-weight: 600; line-height: 1.3; vertical-align: bottom; white-space: normal; max-width: 10rem; border-bottom-color: var(--soft); padding-right: 1rem}
tbody th {font-weight: 400; position: sticky; left: 0; background: var(--page); max-width: 22rem}
td.n, td.v, thead th.n {text-align: right}
td.v, th.v {padding-right: .45rem}
td.i {padding-right: .9rem; color: var(--soft); font-size: .77rem}
tr.again th {color: var(--soft)}
tr.first:not(:first-child) > * {padding-top: .8rem}
.long summary {padding: .2rem 0; font-size: .875rem; color: var(--soft)}
.up, .pass {color: var(--good)} .down, .fail {color: var(--bad)}
.fail {font-weight: 600}
.checks {columns: 24rem auto; padding: 0; margin: 0; list-style: none; font-size: .875rem; font-variant-numeric: tabular-nums}
.checks li {break-inside: avoid; padding: .1rem 0}
.plots {display: grid; grid-template-columns: repeat(auto-fill, minmax(min(100%, 23rem), 1fr)); gap: 1.4rem 2rem;
  margin: 1rem 0; align-items: start}
figure {margin: 0; min-width: 0}
figcaption {font-size: .8125rem; color: var(--soft); margin-top: .3rem}
svg {display: block; width: 100%; max-width: 31rem; height: auto}
svg text {font-family: system-ui, -apple-system, "Segoe UI", sans-serif !important}
.toggle {position: relative; margin: 1rem 0}
.toggle > input {position: absolute; opacity: 0; width: 1px; height: 1px}
.toggle > label {display: inline-block; padding: .25rem .8rem; margin: 0 .3rem .5rem 0; border: 1px solid var(--line);
  border-radius: 1rem; font-size: .875rem; cursor: pointer; color: var(--soft)}
.toggle > input:checked + label {color: var(--page); background: var(--ink); border-color: var(--ink)}
.toggle > input:focus-visible + label, summary:focus-visible, .wide:focus-visible, a:focus-visible,
  input[type=range]:focus-visible {outline: 2px solid var(--link); outline-offset: 2px; border-radius: 4px}
.toggle > input:focus-visible + label {border-radius: 1rem}
.panes > .pane {display: none}
PANES
.pane img {display: block; max-width: 100%; height: auto; border-radius: 4px; background: #fff}
.pane .wide img {max-width: none}
.wipe {position: relative; width: fit-content; max-width: 100%}
.wipe img + img {position: absolute; inset: 0; width: 100%; height: 100%; clip-path: inset(0 0 0 var(--at, 50%))}
.wipe::after {content: ""; position: absolute; top: 0; bottom: 0; left: var(--at, 50%); width: 2px; margin-left: -1px;
  background: #fff; box-shadow: 0 0 3px #000}
.slide {display: flex; gap: .7rem; align-items: center; font-size: .8125rem; color: var(--soft); margin-top: .4rem; max-width: 40rem}
.slide input {flex: 1; min-width: 0; accent-color: var(--link)}
pre {overflow-x: auto; background: var(--tint); padding: .8rem 1rem; border-radius: 6px; font-size: .8125rem; line-height: 1.5}
pre code {font-size: inherit; overflow-wrap: normal}
dl {display: grid; grid-template-columns: minmax(7rem, max-content) 1fr; gap: .3rem 1.2rem; font-size: .875rem; margin: .5rem 0}
dt {font-weight: 600} dd {margin: 0; max-width: 46rem}
nav {font-size: .875rem}
nav summary {font-weight: 600; padding: .4rem 0}
nav ol {list-style: none; margin: 0; padding: 0}
nav a {display: block; padding: .22rem 0; color: var(--soft); text-decoration: none}
nav a:hover {color: var(--link)}
@media (min-width: 70rem) {
  .page {display: grid; grid-template-columns: 10.5rem minmax(0, 1fr); gap: 0 2.2rem}
  header {grid-column: 2}
  nav {position: sticky; top: 1.5rem; align-self: start; max-height: calc(100vh - 3rem); overflow-y: auto; grid-row: 1 / 3}
}
@media (max-width: 40rem) {
  .pane:has(.large) {overflow-x: auto}
  .pane .large {width: 40rem; max-width: none}
  .wipe:has(.large) {max-width: none}
  dl {grid-template-columns: 1fr} dd {margin-bottom: .5rem}
  tbody th {white-space: normal; min-width: 5.5rem; max-width: 9.5rem}
}
@media print {nav {display: none} .page {display: block}}
""".replace(
    "PANES",
    ",\n".join(f".toggle > input:nth-of-type({i}):checked ~ .panes > :nth-child({i})" for i in range(1, MOST_PANES + 1))
    + ", .panes > :only-child {display: block}",
)

SCRIPT = """
const room = matchMedia("(min-width: 70rem)"), contents = document.querySelector("nav details");
const fit = () => { contents.open = room.matches; };
fit();
room.addEventListener("change", fit);
const reveal = () => {
  const part = location.hash && document.getElementById(location.hash.slice(1));
  if (part) { part.querySelector("details").open = true; part.scrollIntoView(); }
};
addEventListener("hashchange", reveal);
reveal();
for (const over of document.querySelectorAll("img[data-under]")) {
  const under = document.getElementById(over.dataset.under), below = under.cloneNode();
  below.removeAttribute("id");
  const box = document.createElement("div"), row = document.createElement("label"), at = document.createElement("input");
  box.className = "wipe";
  row.className = "slide";
  over.replaceWith(box);
  box.append(below, over);
  Object.assign(at, {type: "range", min: 0, max: 100, value: 50});
  at.setAttribute("aria-label", `how far ${over.dataset.name} covers ${under.dataset.name}`);
  at.addEventListener("input", () => box.style.setProperty("--at", `${at.value}%`));
  row.append(under.dataset.name, at, over.dataset.name);
  box.after(row);
}
"""

PAGE = """<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{title}</title>
<style>{css}</style>
</head>
<body>
<div class="page">
<nav aria-label="Contents"><details open><summary>Contents</summary>
<ol>
{contents}
</ol></details></nav>
<header>
<h1>{title}</h1>
{lead}
</header>
<main>
{body}
</main>
</div>
<script>{script}</script>
</body>
</html>
"""


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


def table(content: Table, titled: bool = True) -> str:
    """A table with its title above and its note below; nothing where it has no rows.

    One with a title and many rows is folded. Figures stand right, each interval in a column of its own beside them; the mark of a difference has its colour.
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
        cells = "".join(_cells(cell, split[i + 1], number[i + 1]) for i, cell in enumerate(row[1:]))
        lines.append(f'<tr{kind}><th scope="row">{html.escape(row[0])}</th>{cells}</tr>')
        before = row[0]
    label = html.escape(content.title, quote=True)
    body = "\n".join(lines)
    inside = (
        f'<div class="wide" tabindex="0" role="region" aria-label="{label}"><table>\n<thead><tr>{head}</tr></thead>\n'
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
    data = _encode(image, max(limit, SMALLEST_PICTURE))
    alternative = html.escape(alternative, quote=True)
    source = f"data:image/webp;base64,{base64.b64encode(data).decode()}"
    kind = ' class="large"' if width > LARGE else ""  # not shrunk on a phone, but scrolled
    return f'<img{kind} {attributes} src="{source}" width="{width}" height="{height}" alt="{alternative}">'


def _encode(image: Image.Image, limit: int) -> bytes:
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


def _cells(cell: str, split: bool, number: bool) -> str:
    """One table cell, or two where its column has figures with intervals."""
    text = cell.strip()
    if not split:
        return f'<td class="{"n" if number else "t"}">{html.escape(text)}</td>'
    if match := CELL.fullmatch(text):
        mark = f' <span class="{"up" if match[3] == "▲" else "down"}">{match[3]}</span>' if match[3] else ""
        return f'<td class="v">{html.escape(match[1])}</td><td class="i">{html.escape(match[2])}{mark}</td>'
    return f'<td class="v">{html.escape(text)}</td><td class="i"></td>'


def _prose(text: str) -> str:
    return re.sub("`([^`]+)`", r"<code>\1</code>", html.escape(text))
