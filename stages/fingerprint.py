"""fingerprint: what the code of each stage does, as digests of its script and of all that this imports.

Leaves metrics/fingerprint/<script>.json, `{file: digest}`, which the stages with that script depend on. So editing a module
reruns the stages that use it and no others, and comments, docstrings and the layout of the code rerun nothing.
"""

import ast
import hashlib
import json
import os
import re
from collections.abc import Iterator
from functools import cache
from pathlib import Path

from regvit.pipeline.command import command

# These cannot change a result, so editing them must rerun nothing: re-exports; reading and checking parameters, whose
# values DVC tracks itself; device and batch size; who computes, and how much memory is left; progress bars; how a stage
# ends.
WITHOUT_EFFECT = {
    "regvit/__init__.py",
    "regvit/features/engine.py",
    "regvit/features/memory.py",
    "regvit/data/progress.py",
    "regvit/pipeline/command.py",
    "regvit/pipeline/params.py",
    "regvit/pipeline/runtime.py",
}
OUT = Path("metrics/fingerprint")
DIGITS = 16  # of a SHA-256 in hex
DOCUMENTED = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)


def main() -> None:
    names = scripts(Path())
    OUT.mkdir(parents=True, exist_ok=True)
    for file in OUT.glob("*.json"):
        if file.stem not in names:
            file.unlink()
    changed: dict[str, list[str]] = {}  # scripts by file
    for name in names:
        file, found = OUT / f"{name}.json", fingerprint(name, Path())
        before = json.loads(file.read_text()) if file.is_file() else {}  # dvc.yaml lets it persist
        for key in sorted(before.keys() | found.keys()):
            if before and before.get(key) != found.get(key):
                changed.setdefault(key, []).append(name)
        partial = file.with_suffix(".partial")  # regvit.files would do this, but importing regvit takes seconds
        partial.write_text(json.dumps(found, indent=1) + "\n")
        os.replace(partial, file)
    print(f"the code of {len(names)} stages is recorded{'; what changed it:' if changed else ''}")
    for key, affected in sorted(changed.items()):
        print(f"  {key}: {', '.join(affected)}")


def scripts(root: Path) -> list[str]:
    """Names of the scripts that are stages (they end in `command(main, …)`), but for this one, sorted."""
    found = {
        file.stem for file in (root / "stages").glob("*.py") if re.search(r"\n    command\(\s*main", file.read_text())
    }
    return sorted(found - {"fingerprint"})


def fingerprint(name: str, root: Path) -> dict[str, str]:
    """Digest of the script `stages/<name>.py` and of each file that it imports, by file, sorted.

    Raises:
        ValueError: a file is no Python; the message gives the line.
    """
    return {file: digest(root / file) for file in sorted(closure(f"stages/{name}.py", root))}


@cache
def digest(file: Path) -> str:
    """Start of the SHA-256 of what a file does: of its syntax tree without docstrings, in whatever version of Python.

    A module that reads a docstring (`__doc__`) keeps them all.
    """
    tree = parse(file)
    if "__doc__" not in file.read_text(encoding="utf-8"):
        for node in ast.walk(tree):
            if isinstance(node, DOCUMENTED) and ast.get_docstring(node, clean=False) is not None:
                del node.body[0]
    return hashlib.sha256("\n".join(_leaves(tree)).encode()).hexdigest()[:DIGITS]


def _leaves(node: object) -> Iterator[str]:
    """A syntax tree line by line. What is empty is left out: newer versions of Python have more fields."""
    if isinstance(node, ast.AST):
        yield f"{type(node).__name__}("
        for field, value in ast.iter_fields(node):
            if value is not None and value != []:
                yield field
                yield from _leaves(value)
        yield ")"
    elif isinstance(node, list):
        yield "["
        for each in node:
            yield from _leaves(each)
        yield "]"
    else:
        yield repr(node)


def closure(file: str, root: Path) -> set[str]:
    """The file and all of the project's that it imports, directly or not, less what has no effect."""
    seen, todo = set(), {file}
    while todo:
        seen |= todo
        todo = {found for each in todo for found in imports(each, root)} - seen - WITHOUT_EFFECT
    return seen


@cache
def imports(file: str, root: Path) -> set[str]:
    """The project's files that a file imports, at its top or inside functions."""
    found = set()
    for node in ast.walk(parse(root / file)):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            module = ".".join(part for part in (Path(file).parent.name if node.level else "", node.module) if part)
            names = [module, *(f"{module}.{alias.name}" for alias in node.names)]
        else:
            continue
        if names[0] == "regvit":
            names += _reexported({alias.name for alias in getattr(node, "names", ())}, root)
        for name in names:
            found |= _files_of(name, root)
    return found


def _reexported(names: set[str], root: Path) -> list[str]:
    """The modules from which `regvit/__init__.py` takes these names."""
    lines = parse(root / "regvit/__init__.py").body
    return [
        f"regvit.{line.module}"
        for line in lines
        if isinstance(line, ast.ImportFrom) and names & {alias.name for alias in line.names}
    ]


def parse(file: Path) -> ast.Module:
    """The syntax tree of a file.

    Raises:
        ValueError: it is no Python; the message gives the line.
    """
    try:
        return ast.parse(file.read_text(encoding="utf-8"))
    except SyntaxError as error:
        raise ValueError(f"{file}, line {error.lineno}: {error.msg}; no stage could run it") from error


def _files_of(module: str, root: Path) -> set[str]:
    """The project's file of a dotted name: of the library, or flat in stages/ as scripts import each other."""
    path = module.replace(".", "/") + ".py"
    return {file for file in (path, f"stages/{path}") if (root / file).is_file()}


if __name__ == "__main__":
    command(main, interrupted=f"{OUT} is not finished")
