"""Writes .dvc/plots/: the page of `dvc plots show`, which needs no network, and the charts on it. `make env` calls it.

DVC's own page loads Vega from a CDN, and stays blank offline. This one (offline.html, named in .dvc/config) carries the
same libraries from the package `vl-convert-python` and leaves `{scripts}`, DVC's list of CDN addresses, out. Charts whose
titles are the same up to a colon stand side by side under it, one of each run. A table without rows is named at the end instead
of being drawn as an empty frame. Of templates written for an older Vega-Lite (DVC's own) the version and empty encodings
are dropped, which it would complain about.
"""

import json
from pathlib import Path

import vl_convert

from regvit.pipeline.plot_charts import charts

PAGE = """<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
{refresh_tag}
<title>DVC plots</title>
<style>
body {font-family: system-ui, sans-serif; margin: 1.5rem}
section {display: flex; flex-wrap: wrap; gap: 1rem 2rem; align-items: flex-start}
h2 {flex-basis: 100%; font-size: 1rem; margin: 1.5rem 0 0}
.chart {max-width: 100%; overflow-x: auto}
table {border-spacing: 15px}
img {max-width: 100%; height: auto}
</style>
<script>@LIBRARIES@</script>
<script>
const isEmpty = (value) => value && typeof value === "object" && !Object.keys(value).length;
function tidy(spec) {
  delete spec.$schema;
  for (const [key, value] of Object.entries(spec)) {
    if (isEmpty(value) && !Array.isArray(value)) delete spec[key];
    else if (key !== "data" && value && typeof value === "object") tidy(value);
  }
  if (Array.isArray(spec.params)) spec.params = spec.params.filter((each) => each);
  return spec;
}
const draw = vegaEmbed;
const without = "Tables without rows";
const drawn = [];
vegaEmbed = (place, spec) => {
  const element = document.querySelector(place);
  if (isEmpty(spec)) {
    drawn.push([without, element]);
    element.textContent = element.id;
    return;
  }
  const [kind, ...of] = String(spec.title?.text ?? "").split(": ");
  if (of.length) spec.title.text = of.join(": ");
  drawn.push([kind, element]);
  return draw(element, tidy(spec), {mode: "vega-lite", renderer: "svg"});
};
document.addEventListener("DOMContentLoaded", () => {
  const kinds = [...new Set(drawn.map(([kind]) => kind))].sort((a, b) => (a === without) - (b === without));
  const end = document.createElement("hr");
  document.body.prepend(end);
  for (const kind of kinds) {
    const section = document.createElement("section");
    const heading = document.createElement("h2");
    heading.textContent = kind;
    const charts = drawn.filter(([of]) => of === kind).map(([_, element]) => element);
    for (const element of charts) element.classList.add("chart");
    section.append(heading, ...charts);
    end.before(section);
  }
});
</script>
</head>
<body>
{plot_divs}
</body>
</html>
"""


def main() -> None:
    folder = Path(__file__).parent.parent / ".dvc/plots"
    folder.mkdir(parents=True, exist_ok=True)
    libraries = vl_convert.javascript_bundle().replace("</script", "<\\/script")
    (folder / "offline.html").write_text(PAGE.replace("@LIBRARIES@", libraries), encoding="utf-8")
    for name, template in charts().items():
        (folder / f"{name}.json").write_text(json.dumps(template, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
