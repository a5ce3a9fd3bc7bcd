"""How the report looks and moves: its style sheet, its script, and the frame of the page."""

MOST_PANES = 12  # of one toggle

CSS = """
:root {color-scheme: light dark; --ink: #20242a; --soft: #646b76; --page: #ffffff; --line: #e2e5ea; --tint: #f4f6f8;
  --link: #1f5fae; --good: #1b7a4b; --bad: #b3261e}
@media (prefers-color-scheme: dark) {
  :root {--ink: #dfe3e8; --soft: #98a1ad; --page: #14171b; --line: #2c323a; --tint: #1c2026; --link: #86b4f0;
    --good: #6fcf9b; --bad: #ff8a80}
  .pane img {filter: brightness(.9)}
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
table {border-collapse: separate; border-spacing: 0; font-size: .85rem; font-variant-numeric: tabular-nums lining-nums}
th, td {padding: .32rem .7rem .32rem 0; text-align: left; border-bottom: 1px solid var(--line); white-space: nowrap;
  vertical-align: baseline}
thead th {font-weight: 600; line-height: 1.3; vertical-align: bottom; white-space: normal; max-width: 12rem; border-bottom-color: var(--soft); padding-right: 1rem}
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
.toggle > input:focus-visible + label, summary:focus-visible, .wide:focus-visible, .cards:focus-visible, a:focus-visible,
  input[type=range]:focus-visible {outline: 2px solid var(--link); outline-offset: 2px; border-radius: 4px}
.toggle > input:focus-visible + label {border-radius: 1rem}
.panes > .pane {display: none}
PANES
.pane img {display: block; max-width: 100%; height: auto; border-radius: 4px; background: #fff}
.pane .wide img {max-width: none}
.wipe {position: relative; width: fit-content; max-width: 100%; cursor: ew-resize; user-select: none}
.wipe img + img {position: absolute; inset: 0; width: 100%; height: 100%; clip-path: inset(0 0 0 var(--at, 50%))}
.wipe::after {content: ""; position: absolute; top: 0; bottom: 0; left: var(--at, 50%); width: 2px; margin-left: -1px;
  background: #fff; box-shadow: 0 0 3px #000; pointer-events: none}
.slide {display: flex; gap: .7rem; align-items: center; font-size: .875rem; color: var(--ink); margin: .5rem 0; max-width: 40rem}
.slide input {flex: 1; min-width: 0; height: 1.6rem; margin: 0; accent-color: var(--link); cursor: ew-resize}
.cards {display: grid; grid-template-columns: repeat(auto-fill, minmax(min(100%, 21rem), 1fr)); gap: 1.2rem; margin: .6rem 0}
.card {display: grid; grid-template-columns: 1fr 1fr; gap: .45rem .5rem; padding: .6rem; background: var(--tint); border-radius: 10px}
.card > div {min-width: 0; font-size: .75rem; line-height: 1.3; color: var(--soft)}
.card .wipe {width: 100%}
.card img {width: 100%; border-radius: 4px; image-rendering: pixelated; margin: 0}
.card img.photo {image-rendering: auto}
.card .wipe, .card img.photo {margin-bottom: .2rem}
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
  .cards {grid-template-columns: none; grid-auto-flow: column; grid-auto-columns: 88%; overflow-x: auto; scroll-snap-type: x proximity; gap: .7rem}
  .card {scroll-snap-align: start}
  .stack thead {position: absolute; clip-path: inset(50%); width: 1px; height: 1px; overflow: hidden}
  .stack tr {display: grid; grid-template-columns: minmax(0, 1fr) auto auto; gap: .1rem .5rem; padding: .6rem 0; border-bottom: 1px solid var(--line)}
  .stack tr > *, .stack tr.first:not(:first-child) > * {border: 0; padding: 0}
  .stack tbody th, .stack tr.again th {grid-column: 1 / -1; position: static; max-width: none; font-weight: 600; color: var(--ink)}
  .stack td::before {content: attr(data-of); color: var(--soft); text-align: left; white-space: normal}
  .stack td.v {display: contents; text-align: right}
  .stack td.t {grid-column: 1}
  .stack td.n {grid-column: 2 / -1}
  .stack td.n, .stack td.t {display: flex; gap: .4rem; color: var(--soft)}
  .stack td.none, .stack td.none + td.i {display: none}
  .stack table {width: 100%}
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
  const sheet = document.createElement("div"), box = document.createElement("div");
  const row = document.createElement("label"), at = document.createElement("input");
  sheet.className = "sheet";
  box.className = "wipe";
  row.className = "slide";
  over.replaceWith(sheet);
  box.append(below, over);
  Object.assign(at, {type: "range", min: 0, max: 100, value: 50});
  at.setAttribute("aria-label", `how far ${under.dataset.name} covers ${over.dataset.name}`);
  row.append(under.dataset.name, at, over.dataset.name);
  sheet.append(row, box);
}
for (const sheet of document.querySelectorAll(".sheet")) {
  const at = sheet.querySelector("input[type=range]");
  if (!at) continue;
  const move = (value) => { at.value = value; sheet.style.setProperty("--at", `${at.value}%`); };
  at.addEventListener("input", () => move(at.value));
  for (const box of sheet.querySelectorAll(".wipe")) {
    const point = (event) => {
      const place = box.getBoundingClientRect();
      move(100 * (event.clientX - place.left) / place.width);
    };
    const drag = (event) => event.pointerType !== "touch";  // a finger scrolls; its tap is a click
    box.addEventListener("pointerdown", (event) => { if (drag(event)) { box.setPointerCapture(event.pointerId); point(event); } });
    box.addEventListener("pointermove", (event) => { if (drag(event) && box.hasPointerCapture(event.pointerId)) point(event); });
    box.addEventListener("click", point);
    box.addEventListener("dragstart", (event) => event.preventDefault());
  }
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
