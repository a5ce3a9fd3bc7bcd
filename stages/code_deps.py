"""The code that each stage depends on: its script and all that this imports, as dvc.yaml must list it.

    python stages/code_deps.py            says where dvc.yaml differs
    python stages/code_deps.py --write    corrects it

A stage that lists less could give stale results, one that lists more would rerun for nothing.
"""

import ast
import sys
from pathlib import Path

from ruamel.yaml import YAML

# These cannot change a result, so editing them must rerun nothing: re-exports; reading and checking parameters, whose
# values DVC tracks itself; device and batch size; who computes, and how much memory is left; progress bars; how a stage
# ends.
WITHOUT_EFFECT = {
    "regvit/__init__.py",
    "regvit/engine.py",
    "regvit/memory.py",
    "regvit/progress.py",
    "stages/command.py",
    "stages/params.py",
    "stages/runtime.py",
}


def main(*arguments: str) -> int:
    if arguments not in ((), ("--write",)):
        sys.exit("usage: python stages/code_deps.py [--write]")
    path, yaml = Path("dvc.yaml"), YAML()
    yaml.width, yaml.preserve_quotes = 120, True
    yaml.indent(mapping=2, sequence=4, offset=2)
    pipeline = yaml.load(path)
    wrong = 0
    for name, stage in pipeline["stages"].items():
        body = stage.get("do", stage)
        listed = [dep for dep in body["deps"] if dep.endswith(".py")]
        wanted = sorted(closure(script_of(body), Path()))
        if sorted(listed) == wanted:
            continue
        wrong += 1
        print(f"{name}: missing {sorted(set(wanted) - set(listed))}, not needed {sorted(set(listed) - set(wanted))}")
        for index in reversed([i for i, dep in enumerate(body["deps"]) if dep.endswith(".py")]):
            del body["deps"][index]
        body["deps"].extend(wanted)
    if wrong and arguments:
        yaml.dump(pipeline, path)
        print(f"dvc.yaml: {wrong} stage(s) corrected")
        return 0
    return int(wrong > 0)


def script_of(stage: dict) -> str:
    """`stages/extract.py` of a stage whose cmd is `python stages/extract.py ${item.run} …`."""
    return stage["cmd"].split()[1]


def closure(file: str, root: Path) -> set[str]:
    """The file and all of the project's that it imports, directly or not, less what has no effect."""
    seen, todo = set(), {file}
    while todo:
        seen |= todo
        todo = {found for each in todo for found in imports(each, root)} - seen - WITHOUT_EFFECT
    return seen


def imports(file: str, root: Path) -> set[str]:
    """The project's files that a file imports, at its top or inside functions."""
    found = set()
    for node in ast.walk(ast.parse((root / file).read_text())):
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
    lines = ast.parse((root / "regvit/__init__.py").read_text()).body
    return [
        f"regvit.{line.module}"
        for line in lines
        if isinstance(line, ast.ImportFrom) and names & {alias.name for alias in line.names}
    ]


def _files_of(module: str, root: Path) -> set[str]:
    """The project's file of a dotted name: of the library, or flat in stages/ as scripts import each other."""
    path = module.replace(".", "/") + ".py"
    return {file for file in (path, f"stages/{path}") if (root / file).is_file()}


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
