"""Writes .dvc/plots/: the page of `dvc plots show`, which needs no network, and two charts for it. `make env` calls it.

DVC's own page loads Vega from a CDN, and stays blank offline. This one (offline.html, named in .dvc/config) carries the
same libraries from the package `vl-convert-python` and leaves `{scripts}`, DVC's list of CDN addresses, out. DVC's own
templates draw what they can; `curves` and `bars` draw tables with the columns `run, panel, x, y, lo, hi` (`report.plot_tables`),
with intervals as bands and whiskers, which DVC's know nothing of. DVC hands the cells of a CSV over as text, and an empty
cell is a value that is not there; an interval that is not there is drawn as none.
"""

import json
from pathlib import Path

import vl_convert

PAGE = """<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
{refresh_tag}
<title>DVC plots</title>
<style>
body {font-family: system-ui, sans-serif; margin: 1.5rem; display: flex; flex-wrap: wrap; gap: 1.5rem 2.5rem; align-items: flex-start}
body > div {max-width: 100%; overflow-x: auto}
img {max-width: 100%; height: auto}
</style>
<script>@LIBRARIES@</script>
<script>
// Templates written for an older Vega-Lite (DVC's own): without their version and empty encodings, of which it would complain.
const isEmpty = (value) => value && typeof value === "object" && !Array.isArray(value) && !Object.keys(value).length;
function tidy(spec) {
  delete spec.$schema;
  for (const [key, value] of Object.entries(spec)) {
    if (isEmpty(value)) delete spec[key];
    else if (key !== "data" && value && typeof value === "object") tidy(value);
  }
  if (Array.isArray(spec.params)) spec.params = spec.params.filter((each) => each);
  return spec;
}
const draw = vegaEmbed;
vegaEmbed = (place, spec) => {
  if (!isEmpty(spec)) return draw(place, tidy(spec), {mode: "vega-lite", renderer: "svg"});
  const element = document.querySelector(place);
  element.textContent = `${element.id}: no rows`;
};
</script>
</head>
<body>
{plot_divs}
</body>
</html>
"""
TITLE, DATA, X, Y, X_LABEL, Y_LABEL = (
    f"<DVC_METRIC_{name}>" for name in ("TITLE", "DATA", "X", "Y", "X_LABEL", "Y_LABEL")
)
REVISION = {"field": "rev", "type": "nominal", "title": "revision", "sort": []}
RUN = {"field": "run", "type": "nominal", "title": None, "sort": []}
PANEL = {"field": "panel", "type": "nominal", "title": None, "sort": []}
SIDE = 180  # pixels of a panel
ENDS = [{"calculate": f"datum.{end} ? toNumber(datum.{end}) : datum.y", "as": end} for end in ("lo", "hi")]


def charts() -> dict[str, dict]:
    """Template by name, as dvc.yaml says it under `template`: a panel a value of `panel`, a colour a run."""
    x_number, y_number = ({"calculate": f"toNumber(datum['{of}'])", "as": to} for of, to in ((X, "x"), (Y, "y")))
    order = {"field": "nth", "type": "quantitative"}  # as in the table: a ROC may rise at one x
    line = {"mark": {"type": "line", "point": {"size": 12}, "tooltip": {"content": "data"}}}
    line["encoding"] = {"strokeDash": REVISION, "order": order, "y": _axis("y", Y_LABEL)}
    band = {"mark": {"type": "area", "opacity": 0.2}}
    band["encoding"] = {"y": _axis("lo", Y_LABEL), "y2": {"field": "hi"}, "detail": REVISION}
    along = {"x": _axis("x", X_LABEL), "color": RUN}
    rank = {"window": [{"op": "row_number", "as": "nth"}]}

    bar = {
        "mark": {"type": "bar", "opacity": 0.7, "tooltip": {"content": "data"}},
        "encoding": {"x": _axis("y", Y_LABEL)},
    }
    ends = {"x": _axis("lo", Y_LABEL), "x2": {"field": "hi"}, "color": {"value": "black"}}
    whisker = {"mark": "rule", "encoding": ends}
    up = {"y": {"field": X, "type": "nominal", "title": None, "sort": []}, "yOffset": REVISION, "color": RUN}
    return {
        "curves": _panels([rank, x_number, y_number, *ENDS], {"encoding": along, "layer": [band, line]}, "x", "y"),
        "bars": _panels([y_number, *ENDS], {"encoding": up, "layer": [bar, whisker], "height": {"step": 16}}, "x"),
    }


def _axis(field: str, title: str) -> dict:
    return {"field": field, "type": "quantitative", "title": title, "scale": {"zero": False}}


def _panels(transform: list[dict], drawn: dict, *independent: str) -> dict:
    """Each panel has axes of its own for what is named in `independent`."""
    return {
        "title": {"text": TITLE, "anchor": "start"},
        "data": {"values": DATA},
        "transform": transform,
        "facet": PANEL,
        "columns": 3,
        "spec": {"width": SIDE, "height": SIDE} | drawn,
        "resolve": {"scale": dict.fromkeys(independent, "independent")},
    }


def main() -> None:
    folder = Path(__file__).parents[2] / ".dvc/plots"
    folder.mkdir(parents=True, exist_ok=True)
    libraries = vl_convert.javascript_bundle().replace("</script", "<\\/script")
    (folder / "offline.html").write_text(PAGE.replace("@LIBRARIES@", libraries), encoding="utf-8")
    for name, template in charts().items():
        (folder / f"{name}.json").write_text(json.dumps(template, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
