"""Writes .dvc/plots/offline.html, with which the page of `dvc plots show` needs no network. `make env` calls it.

DVC's own template loads Vega from a CDN, and the page stays blank offline. This one carries the same libraries from
the package `vl-convert-python` and leaves `{scripts}`, DVC's list of CDN addresses, out. .dvc/config names it.
"""

from pathlib import Path

import vl_convert

PAGE = """<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
{refresh_tag}
<title>DVC plots</title>
<style>body {font-family: system-ui, sans-serif} table {border-spacing: 15px}</style>
<script>@LIBRARIES@</script>
</head>
<body>
{plot_divs}
</body>
</html>
"""


def main() -> None:
    libraries = vl_convert.javascript_bundle().replace("</script", "<\\/script")
    page = Path(__file__).parent.parent / ".dvc/plots/offline.html"
    page.parent.mkdir(parents=True, exist_ok=True)
    page.write_text(PAGE.replace("@LIBRARIES@", libraries), encoding="utf-8")


if __name__ == "__main__":
    main()
