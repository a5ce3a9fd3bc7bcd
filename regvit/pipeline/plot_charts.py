"""The charts of `dvc plots show`: Vega-Lite templates by the name that dvc.yaml has for them.

DVC's own templates know one column for x and one for y; so curves of several readouts would be one cloud of dots. These
draw what tells rows apart (detector, class, block, head…) as colours and panels, intervals (`<column>_lo`, `<column>_hi`)
as bands and whiskers, and revisions, where `dvc plots diff` gives several, as dashes, shapes or panels of their own. DVC
hands the cells of a CSV over as text, and an empty cell is a value that is not there: hence `number` and `there`.
"""

TITLE, DATA, X, Y, X_LABEL, Y_LABEL = (
    f"<DVC_METRIC_{name}>" for name in ("TITLE", "DATA", "X", "Y", "X_LABEL", "Y_LABEL")
)
REVISION = {"field": "rev", "type": "nominal", "title": "revision", "sort": []}
WIDTH, HEIGHT = 240, 200  # of a chart, in pixels
NARROW = 160  # of one panel of several


def charts() -> dict[str, dict]:
    """Template by name, as dvc.yaml says it under `template`."""
    norms = ["min", "median", "p99", "q99", "max", "outlier_median"]  # those that the table has
    return {
        "norms": lines({"field": "column", "sort": norms, "title": None}, fold=norms, scale={"type": "log"}),
        "histogram": lines(
            {"field": "column", "sort": ["before", "after"], "title": None},
            fold=["before", "after"],
            scale={"type": "symlog"},
            interpolate="step",
        ),
        "curve": lines(REVISION, band=True),
        "readouts": lines({"field": "rate", "type": "ordinal"}, panels="readout"),
        "roc": lines({"field": "detector", "sort": []}, panels="dataset"),
        "sweep": sweep(),
        "bars": bars(),
        "distribution": distribution(),
        "points": points(),
        "classes": points({"field": "class", "sort": []}, {"type": "sqrt"}),
        "neurons": neurons(),
        "confusion": confusion(),
        "heads": heat("head"),
        "register_heads": heat("head", rows="query"),
        "grid": heat("row"),
        "differences": differences(),
    }


def chart(transform: list[dict], what: dict, facet: dict | None = None, columns: int | None = None) -> dict:
    """A template: title, data and transforms around a mark or layers, once or in panels."""
    top = {"title": {"text": TITLE, "anchor": "middle"}, "data": {"values": DATA}, "transform": transform}
    if facet is None:
        return top | {"width": WIDTH, "height": HEIGHT} | what
    spec = {"width": NARROW, "height": NARROW} | what
    return top | {"facet": facet, "spec": spec} | ({} if columns is None else {"columns": columns})


def number(column: str, name: str) -> dict:
    """The transform that reads a column as numbers."""
    return {"calculate": f"toNumber(datum['{column}'])", "as": name}


def there(*names: str) -> dict:
    """The transform that leaves out rows without one of these numbers."""
    return {"filter": " && ".join(f"isValid(datum.{name})" for name in names)}


def axis(field: str, title: str | None, scale: dict | None = None) -> dict:
    """A quantitative axis; without a scale a linear one that need not start at zero."""
    return {"field": field, "type": "quantitative", "title": title, "scale": scale or {"zero": False}}


def table_of_panels(row: str, column: str) -> dict:
    """Facets by two columns. They keep Vega-Lite's own order: one that the data give would put panels under wrong names."""
    return {
        side: {"field": name, "type": "nominal", "title": None} for side, name in (("row", row), ("column", column))
    }


def nominal(of: dict) -> dict:
    """An encoding of a field, nominal unless it says otherwise."""
    return {"type": "nominal"} | of


def lines(
    colour: dict,
    fold: list[str] | None = None,
    scale: dict | None = None,
    interpolate: str = "linear",
    band: bool = False,
    panels: str | None = None,
) -> dict:
    """Curves by colour, revisions by dash.

    Args:
        colour: encoding of what is one curve.
        fold: columns that are a curve each; they take the place of the y column.
        scale: of the y axis.
        band: the interval of the y column is shaded.
        panels: column with a panel for each of its values.
    """
    start = [{"fold": fold, "as": ["column", "value"]}, number("value", "y")] if fold else [number(Y, "y")]
    encoding = {"x": axis("x", X_LABEL), "y": axis("y", Y_LABEL, scale), "color": nominal(colour)}
    drawn = {"mark": {"type": "line", "interpolate": interpolate, "tooltip": {"content": "data"}}}
    drawn["encoding"] = {} if colour is REVISION else {"strokeDash": REVISION}
    drawn["encoding"]["order"] = {"field": "nth", "type": "quantitative"}  # as in the table: a ROC may rise at one x
    layers = [drawn]
    if band:
        ends = [number(f"{Y}_lo", "lo"), number(f"{Y}_hi", "hi"), there("lo", "hi")]
        shade = {"y": axis("lo", Y_LABEL), "y2": {"field": "hi"}}
        layers.insert(0, {"transform": ends, "mark": {"type": "area", "opacity": 0.2}, "encoding": shade})
    rank = {"window": [{"op": "row_number", "as": "nth"}]}
    facet = None if panels is None else {"field": panels, "type": "nominal", "title": None, "sort": []}
    return chart(
        [rank, *start, number(X, "x"), number("learning_rate", "rate"), there("x", "y")],
        {"encoding": encoding, "layer": layers},
        facet,
        columns=3,
    )


def sweep() -> dict:
    """LOST by bias: a panel a feature, a colour a block, dashed where features are not normalised."""
    encoding = {
        "x": axis("x", X_LABEL),
        "y": axis("y", Y_LABEL),
        "color": {"field": "block", "type": "ordinal"},
        "strokeDash": {"field": "normalised", "type": "nominal", "sort": "descending"},
    }
    facet = table_of_panels("rev", "kind")
    mark = {"type": "line", "tooltip": {"content": "data"}}
    return chart(
        [number(X, "x"), number(Y, "y"), number("layer", "block"), there("x", "y")],
        {"mark": mark, "encoding": encoding},
        facet,
    )


def bars() -> dict:
    """The x column by name (the y column), with whiskers; revisions side by side."""
    encoding = {"y": {"field": Y, "type": "nominal", "title": Y_LABEL, "sort": []}, "yOffset": REVISION}
    bar = {
        "mark": {"type": "bar", "opacity": 0.7, "tooltip": {"content": "data"}},
        "encoding": {"x": axis("x", X_LABEL, {"zero": True}), "color": REVISION},
    }
    ends = [number(f"{X}_lo", "lo"), number(f"{X}_hi", "hi"), there("lo", "hi")]
    whisker = {
        "transform": ends,
        "mark": "rule",
        "encoding": {"x": axis("lo", X_LABEL, {"zero": True}), "x2": {"field": "hi"}},
    }
    return chart([number(X, "x"), there("x")], {"encoding": encoding, "layer": [bar, whisker]})


def distribution() -> dict:
    """How many rows have which value of the x column, and the mean."""
    bins = {"field": "x", "type": "quantitative", "title": X_LABEL, "bin": {"maxbins": 30}}
    count = {"aggregate": "count", "type": "quantitative", "title": Y_LABEL, "stack": None}
    mean = {"aggregate": "mean", "field": "x", "type": "quantitative"}
    layers = [
        {"mark": {"type": "bar", "opacity": 0.6, "tooltip": True}, "encoding": {"x": bins, "y": count}},
        {"mark": {"type": "rule", "size": 2, "tooltip": True}, "encoding": {"x": mean}},
    ]
    return chart([number(X, "x"), there("x")], {"encoding": {"color": REVISION}, "layer": layers})


def points(colour: dict = REVISION, scale: dict | None = None) -> dict:
    """A dot a row; revisions by shape."""
    encoding = {"x": axis("x", X_LABEL, scale), "y": axis("y", Y_LABEL, scale), "color": nominal(colour)}
    encoding |= {} if colour is REVISION else {"shape": REVISION}
    mark = {"type": "point", "opacity": 0.6, "tooltip": {"content": "data"}}
    return chart([number(X, "x"), number(Y, "y"), there("x", "y")], {"mark": mark, "encoding": encoding})


def neurons() -> dict:
    """Neurons by rank, coloured by whether they were selected and, where that is known, planted."""
    kinds = ["selected", "selected, planted", "planted, not selected", "neither"]
    kind = {
        "calculate": f"+datum.selected ? (+datum.planted ? '{kinds[1]}' : '{kinds[0]}')"
        f" : (+datum.planted ? '{kinds[2]}' : '{kinds[3]}')",
        "as": "neuron is",
    }
    drawn = points({"field": "neuron is", "sort": kinds})
    return drawn | {"transform": [*drawn["transform"], kind]}


def confusion() -> dict:
    """Counts of actual and predicted classes."""
    place = {
        "x": {"field": X, "type": "nominal", "title": X_LABEL},
        "y": {"field": Y, "type": "nominal", "title": Y_LABEL},
    }
    count = {"aggregate": "count", "type": "quantitative", "title": "images"}
    layers = [
        {"mark": {"type": "rect", "tooltip": True}, "encoding": {"color": count | {"scale": {"scheme": "blues"}}}},
        {"mark": {"type": "text", "fontSize": 9}, "encoding": {"text": count}},
    ]
    return chart(
        [],
        {"encoding": place, "layer": layers, "width": HEIGHT, "height": HEIGHT},
        {"column": REVISION | {"title": None}},
    )


def heat(down: str, rows: str | None = None) -> dict:
    """The y column as colour, by the x column and the column `down`.

    Args:
        rows: column with a row of panels for each of its values.
    """
    encoding = {
        "x": {"field": "x", "type": "ordinal", "title": X_LABEL, "axis": {"labelOverlap": True}},
        "y": {"field": "down", "type": "ordinal", "title": down, "axis": {"labelOverlap": True}},
        "color": axis("y", Y_LABEL, {"scheme": "viridis"}),
    }
    facet = {"column": REVISION | {"title": None}} if rows is None else table_of_panels(rows, "rev")
    what = {"mark": {"type": "rect", "tooltip": {"content": "data"}}, "encoding": encoding}
    return chart([number(X, "x"), number(Y, "y"), number(down, "down"), there("x", "y")], what, facet)


def differences() -> dict:
    """Runs minus their references: a panel a run and data set, a row a readout, with intervals; accuracy only."""
    place = {
        "y": {"field": "readout", "type": "nominal", "title": None, "sort": []},
        "yOffset": REVISION,
        "color": nominal({"field": "differs", "title": "differs from 0", "scale": {"range": ["#9aa0a6", "#d1495b"]}}),
    }
    ends = {"x": axis("lo", X_LABEL), "x2": {"field": "hi"}}
    layers = [
        {"mark": "rule", "encoding": ends},
        {
            "mark": {"type": "point", "filled": True, "tooltip": {"content": "data"}},
            "encoding": {"x": axis("x", X_LABEL)},
        },
        {"mark": {"type": "rule", "strokeDash": [2, 2]}, "encoding": {"x": {"datum": 0}} | dict.fromkeys(place)},
    ]
    facet = table_of_panels("pair", "dataset")
    transform = [
        {"filter": "datum.metric == 'top1'"},
        *(number(*each) for each in ((X, "x"), ("lo", "lo"), ("hi", "hi"))),
        there("x", "lo", "hi"),
        {"calculate": "datum.run + ' − ' + datum.reference", "as": "pair"},
        {"calculate": "datum.lo > 0 || datum.hi < 0 ? 'yes' : 'no'", "as": "differs"},
    ]
    return chart(transform, {"encoding": place, "layer": layers}, facet)
