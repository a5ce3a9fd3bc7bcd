"""The fingerprint of a stage's code: changed by what changes what the code does, and by nothing else."""

import json
import shutil
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent.parent
sys.path.insert(0, str(ROOT / "stages"))
import fingerprint  # noqa: E402

CODE = '''
"""What the module holds."""

import math


class Circle:
    """A circle."""

    def area(self, radius: float) -> float:
        """Its area."""
        return math.pi * radius**2  # in units of its own


LINES = """
one

three"""
'''


@pytest.fixture
def digest_of(tmp_path):
    """Digest of a text as a module's code."""

    def made(text: str) -> str:
        fingerprint.digest.cache_clear()
        (tmp_path / "module.py").write_text(text)
        return fingerprint.digest(tmp_path / "module.py")

    return made


@pytest.fixture
def project(tmp_path, monkeypatch):
    """The code of this repository elsewhere, with its fingerprints."""
    for name in ("stages", "regvit"):
        shutil.copytree(ROOT / name, tmp_path / name, ignore=shutil.ignore_patterns("__pycache__"))
    monkeypatch.chdir(tmp_path)
    run()
    return tmp_path


def run():
    for kept in (fingerprint.digest, fingerprint.imports):
        kept.cache_clear()
    fingerprint.main()


def contents():
    return {file.name: file.read_text() for file in fingerprint.OUT.iterdir()}


@pytest.mark.parametrize(
    ("before", "after"),
    [
        ("  # in units of its own", "  # squared"),
        ('"""What the module holds."""', '"""Circles."""'),
        ('        """Its area."""\n', ""),
        ("math.pi * radius**2", "(\n            math.pi\n            * radius ** 2)"),
        ("import math\n", "import math\n\n\n"),
        ("import math\n", "import math\n# a remark of its own\n"),
    ],
)
def test_comments_docstrings_and_layout_do_not_count(digest_of, before, after):
    assert before in CODE
    assert digest_of(CODE.replace(before, after)) == digest_of(CODE)


@pytest.mark.parametrize(
    ("before", "after"),
    [
        ("radius**2", "radius**3"),
        ("radius**2", "radius*2"),
        ("import math", "import cmath as math"),
        ("one\n\nthree", "one\n\n\nthree"),
        ("def area", "async def area"),
        ("radius: float", "radius: float = 1.0"),
        ("LINES", "ROWS"),
        ("    def area", "    @staticmethod\n    def area"),
    ],
)
def test_whatever_runs_counts(digest_of, before, after):
    assert before in CODE
    assert digest_of(CODE.replace(before, after)) != digest_of(CODE)


def test_a_docstring_counts_where_the_module_reads_one(digest_of):
    told = CODE + "\nprint(__doc__)\n"
    assert digest_of(told.replace("What the module holds", "Circles")) != digest_of(told)


def test_fields_that_a_newer_python_adds_empty_do_not_count(digest_of, monkeypatch):
    before = digest_of(CODE)
    fields = fingerprint.ast.FunctionDef._fields
    monkeypatch.setattr(fingerprint.ast.FunctionDef, "_fields", (*fields, "added_list", "added_value"))
    monkeypatch.setattr(fingerprint.ast.FunctionDef, "added_list", [], raising=False)
    monkeypatch.setattr(fingerprint.ast.FunctionDef, "added_value", None, raising=False)
    assert digest_of(CODE) == before


def test_the_digest_of_a_text_is_the_same_in_every_version_of_python(digest_of):
    text = "def f(x: int = 0, *, y=None) -> str:\n    return f'{1 + x!r:>{y}} and {x}' 'more'\n"
    assert digest_of(text) == "ea46f3c4876fb80e"  # as 3.11 and 3.14 have it


def test_only_the_stages_that_use_a_module_have_another_fingerprint(project, capsys):
    before = contents()
    with open(project / "regvit/stats/metrics.py", "a") as file:
        file.write("\nCHANGED = True\n")
    capsys.readouterr()
    run()
    changed = sorted(Path(name).stem for name, text in contents().items() if text != before[name])
    assert changed == ["differences", "discover", "evaluate", "probe", "report", "segment", "zeroshot"]
    assert f"  regvit/stats/metrics.py: {', '.join(changed)}\n" in capsys.readouterr().out
    assert json.loads((fingerprint.OUT / "extract.json").read_text()).keys() >= {
        "stages/extract.py",
        "regvit/features/store.py",
    }


def test_a_module_without_effect_is_in_no_fingerprint(project):
    before = contents()
    for name in fingerprint.WITHOUT_EFFECT - {"regvit/__init__.py"}:
        with open(project / name, "a") as file:
            file.write("\nCHANGED = True\n")
    run()
    assert contents() == before


def test_what_is_said_is_short_where_nothing_changed_and_a_script_that_is_gone_leaves_nothing(project, capsys):
    (project / "stages/zeroshot.py").unlink()
    capsys.readouterr()
    run()
    assert capsys.readouterr().out == f"the code of {len(fingerprint.scripts(project))} stages is recorded\n"
    assert not (fingerprint.OUT / "zeroshot.json").exists()


def test_a_file_that_is_no_python_is_named_with_its_line(project):
    (project / "regvit/models/tokens.py").write_text("x = 1\ny = = 2\n")
    with pytest.raises(ValueError, match=r"tokens.py, line 2: invalid syntax"):
        run()
