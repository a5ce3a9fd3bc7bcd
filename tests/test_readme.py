"""The README's Python is run as it stands."""

import re
from pathlib import Path

import timm
import torch

README = Path(__file__).parents[1] / "README.md"
EXAMPLES = re.findall(
    r"<!-- example: tests/test_readme.py runs this -->\n```python\n(.*?)```", README.read_text(), re.S
)


def test_the_two_lines_add_registers_to_a_model():
    model = timm.create_model("test_vit", pretrained=False).eval()
    exec(EXAMPLES[0], {"model": model, "images": torch.randn(8, 3, 160, 160)})
    assert model.num_prefix_tokens == 2


def test_the_whole_example_runs_and_its_shapes_are_as_the_comments_say(capsys):
    names: dict = {}
    exec(EXAMPLES[1], names)
    assert names["tokens"].shape == (16, 66, 384)
    assert names["patches"].shape == (16, 64, 384)
    assert "None {}" in capsys.readouterr().out
