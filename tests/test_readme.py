"""README.md and docs/: their Python is run as it stands, and they stay what a person reads."""

import re
import tomllib
from pathlib import Path

import pytest
import timm
import torch
from ruamel.yaml import YAML
from white_patches import picture, plant_one

ROOT = Path(__file__).parents[1]
PAGES = sorted((ROOT / "docs").glob("*.md"))


def example(page: str) -> str:
    """The Python under the marker on a page."""
    marked = r"<!-- example: tests/test_readme.py runs this -->\n```python\n(.*?)```"
    (text,) = re.findall(marked, (ROOT / page).read_text(encoding="utf-8"), re.S)
    return text


def test_the_two_lines_search_a_model_and_leave_it_as_it_is_where_there_is_nothing_to_cure():
    model = timm.create_model("test_vit", pretrained=False).eval()
    with pytest.warns(UserWarning, match="the search found no register neurons"):
        exec(example("README.md"), {"model": model, "images": torch.randn(8, 3, 160, 160)})
    assert model.num_prefix_tokens == 1


def test_the_two_lines_add_a_register_to_a_model_with_outliers():
    args = {"img_size": 64, "patch_size": 8, "depth": 6, "embed_dim": 64, "num_heads": 4, "num_classes": 0}
    torch.manual_seed(0)
    model = timm.create_model("vit_tiny_patch16_224", pretrained=False, **args).eval().requires_grad_(False)
    images = torch.stack([torch.from_numpy(picture(i)).permute(2, 0, 1) / 127.5 - 1 for i in range(12)])
    plant_one(model, images)
    exec(example("README.md"), {"model": model, "images": images})
    assert model.num_prefix_tokens == 2


def test_the_whole_example_runs_and_its_shapes_are_as_the_comments_say(capsys):
    names: dict = {}
    exec(example("docs/python.md"), names)
    assert names["tokens"].shape == (16, 66, 384)
    assert names["patches"].shape == (16, 64, 384)
    assert "None {}" in capsys.readouterr().out


def test_the_readme_is_one_to_two_screens():
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    assert len(text.splitlines()) <= 200
    assert len(text.encode()) <= 9_216
    results = text[text.index("<!-- results") : text.index("<!-- end of results -->")]
    assert len(re.findall(r"^\|", results, re.M)) <= 12, "a head, a rule and ten rows at most"
    order = [
        text.index(mark) for mark in ("**Find", "![", "make repro", "<!-- results", "```python", "## What was not run")
    ]
    assert order == sorted(order)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_every_page_begins_with_its_contents_and_the_readme_leads_to_it(page):
    lines = page.read_text(encoding="utf-8").splitlines()
    sections = [line[3:] for line in lines if line.startswith("## ")]
    contents = next(line for line in lines if line.startswith("["))
    linked = re.findall(r"\]\(#([^)]+)\)", contents)
    anchors = [re.sub(r"[^\w\- ]", "", section.lower()).replace(" ", "-") for section in sections]
    assert lines.index(contents) <= 4
    assert set(linked) <= set(anchors) and len(linked) >= len(sections) // 2
    assert f"docs/{page.name}" in (ROOT / "README.md").read_text(encoding="utf-8")


def test_the_citation_says_the_version_of_the_package():
    cited = YAML(typ="safe").load(ROOT / "CITATION.cff")
    (version,) = re.findall(r'^version = "(.*)"$', (ROOT / "pyproject.toml").read_text(), re.M)
    assert cited["version"] == version
    assert f"## {version}\n" in (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")


def test_every_file_that_contributing_names_exists_and_twenty_questions_are_answered():
    text = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")
    named = re.findall(r"`((?:regvit|tests|stages|choices)/[\w./]*)`", text)
    assert [name for name in named if not (ROOT / name).exists()] == []
    answers = text[text.index("## Where is what") : text.index("## How code looks")]
    assert len(re.findall(r"^\| .*\? \| `", answers, re.M)) >= 20


def test_contributing_lists_the_rooms_in_the_order_that_is_held():
    text = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")
    listed = re.findall(r"^\| `regvit/(\w+)(?:\.py)?` \|", text, re.M)
    contracts = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["importlinter"]["contracts"]
    (layers,) = [contract["layers"] for contract in contracts if contract["type"] == "layers"]
    assert listed == [layer for layer in reversed(layers) if not layer.startswith("(")]
