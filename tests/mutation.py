"""Mutation testing: would the tests of a module notice if it were wrong? `make mutation MODULE=metrics`

    python tests/mutation.py <module> [--most N] [--seed 0] [--jobs 2] [--show]

One operator, number, text, condition or statement of regvit/<module>.py is changed at a time (the list is `variants`), and
tests/test_<module>*.py are run on that. A mutant is killed if a test fails or takes five times as long as it should.
Left alone are docstrings, annotations, imports, decorators and the wording of errors, which say nothing to the machine.

The heavy packages are imported once and each mutant runs in a fork, which takes a second where a process of its own
(mutmut, cosmic-ray) takes ten. Exit status 1 where fewer than 85 % are killed; survivors are listed with their lines.
"""

import argparse
import ast
import copy
import importlib
import os
import random
import signal
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from importlib.machinery import PathFinder, SourceFileLoader
from importlib.util import spec_from_file_location
from pathlib import Path

ROOT = Path(__file__).parents[1]
WANTED = 0.85  # share of killed mutants
HEAVY = (
    "numpy",
    "scipy.stats",
    "sklearn.metrics",
    "torch",
    "timm",
    "safetensors.torch",
    "zarr",
    "hypothesis",
    "PIL.Image",
)
COMPARISONS = {ast.Lt: ast.LtE, ast.LtE: ast.Lt, ast.Gt: ast.GtE, ast.GtE: ast.Gt, ast.Eq: ast.NotEq, ast.NotEq: ast.Eq,
               ast.Is: ast.IsNot, ast.IsNot: ast.Is, ast.In: ast.NotIn, ast.NotIn: ast.In}  # fmt: skip
OPERATORS = {ast.Add: ast.Sub, ast.Sub: ast.Add, ast.Mult: ast.Div, ast.Div: ast.Mult, ast.FloorDiv: ast.Div,
             ast.Mod: ast.Mult, ast.Pow: ast.Mult, ast.BitAnd: ast.BitOr, ast.BitOr: ast.BitAnd, ast.LShift: ast.RShift,
             ast.RShift: ast.LShift, ast.BitXor: ast.BitAnd}  # fmt: skip


@dataclass(frozen=True)
class Mutant:
    """One change: the place of its node in `ast.walk`, which of the node's variants it is, its line and what it says."""

    node: int
    variant: int
    line: int
    change: str


def variants(node: ast.AST) -> Iterator[ast.AST]:
    """What stands in the place of a node, one at a time."""
    if isinstance(node, ast.Compare):
        for i, operator in enumerate(node.ops):
            yield _with(node, ops=[*node.ops[:i], COMPARISONS[type(operator)](), *node.ops[i + 1 :]])
    elif isinstance(node, ast.BinOp | ast.AugAssign) and type(node.op) in OPERATORS:
        yield _with(node, op=OPERATORS[type(node.op)]())
    elif isinstance(node, ast.BoolOp):
        yield _with(node, op=ast.Or() if isinstance(node.op, ast.And) else ast.And())
    elif isinstance(node, ast.UnaryOp):
        yield node.operand
    elif isinstance(node, ast.If | ast.While | ast.IfExp):
        yield _with(node, test=ast.UnaryOp(ast.Not(), node.test))
    elif isinstance(node, ast.Constant) and isinstance(node.value, bool):
        yield _with(node, value=not node.value)
    elif isinstance(node, ast.Constant) and isinstance(node.value, int | float):
        yield _with(node, value=node.value + 1)
    elif isinstance(node, ast.Constant) and isinstance(node.value, str):
        yield _with(node, value=f"XX{node.value}")
    elif isinstance(node, ast.Return) and node.value is not None:
        yield _with(node, value=None)
    elif isinstance(node, ast.Raise) or (isinstance(node, ast.Expr) and isinstance(node.value, ast.Call)):
        yield ast.copy_location(ast.Pass(), node)
    elif isinstance(node, ast.Break | ast.Continue):
        yield ast.copy_location(ast.Continue() if isinstance(node, ast.Break) else ast.Break(), node)


def mutants(tree: ast.Module) -> list[Mutant]:
    """All changes of a module, in the order of its lines."""
    silent = _silent(tree)
    found = []
    for place, node in enumerate(ast.walk(tree)):
        if id(node) not in silent:
            for number, new in enumerate(variants(node)):
                change = f"{_first_line(node)}  ->  {_first_line(new)}"
                found.append(Mutant(place, number, node.lineno, change))
    return sorted(found, key=lambda one: (one.line, one.node, one.variant))


def mutated(source: str, mutant: Mutant) -> ast.Module:
    """The module with that one change."""
    tree = ast.parse(source)
    old = list(ast.walk(tree))[mutant.node]
    new = list(variants(old))[mutant.variant]
    return ast.fix_missing_locations(_Swap(old, new).visit(tree))


class _Swap(ast.NodeTransformer):
    def __init__(self, old: ast.AST, new: ast.AST):
        self.old, self.new = old, new

    def visit(self, node: ast.AST) -> ast.AST:
        return self.new if node is self.old else self.generic_visit(node)


def _with(node: ast.AST, **fields: object) -> ast.AST:
    new = copy.copy(node)
    for name, value in fields.items():
        setattr(new, name, value)
    return new


def _first_line(node: ast.AST) -> str:
    return ast.unparse(ast.fix_missing_locations(copy.deepcopy(node))).splitlines()[0]


def _silent(tree: ast.Module) -> set[int]:
    """Nodes that are left alone, by id."""
    roots = []
    for node in ast.walk(tree):
        roots += getattr(node, "decorator_list", [])
        roots += [part for part in (getattr(node, "annotation", None), getattr(node, "returns", None)) if part]
        if isinstance(node, ast.Import | ast.ImportFrom) or (
            isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant)
        ):
            roots.append(node)
        elif isinstance(node, ast.Raise):
            roots += [part for part in (node.exc, node.cause) if part]
    return {id(inner) for root in roots for inner in ast.walk(root)}


# Running tests on a mutant.


class _Loader(SourceFileLoader):
    """Loads a module from a changed tree; its name and file are its own."""

    tree: ast.Module

    def get_code(self, fullname: str):
        return compile(self.tree, self.get_filename(fullname), "exec")


class _Finder:
    """Finds the one module that is changed."""

    def __init__(self, name: str, file: Path, tree: ast.Module):
        self.name, self.file, self.tree = name, file, tree

    def find_spec(self, name: str, path=None, target=None):
        if name != self.name:
            return None
        loader = _Loader(name, str(self.file))
        loader.tree = self.tree
        return spec_from_file_location(name, self.file, loader=loader)


def run_tests(module: str, tests: list[str], tree: ast.Module, log: int) -> int:
    """pytest's exit status on the tests, in this process, with the module as the tree has it."""
    import pytest

    os.dup2(log, 1), os.dup2(log, 2)
    sys.meta_path.insert(0, _Finder(f"regvit.{module}", ROOT / f"regvit/{module}.py", tree))
    with tempfile.TemporaryDirectory(prefix="mutant-") as folder:
        options = ["-x", "-q", "--no-header", "--tb=line", "-p", "no:cacheprovider", f"--basetemp={folder}/t"]
        return int(pytest.main([*options, *tests]))


class Runs:
    """Forks that run tests, at most `jobs` at a time."""

    def __init__(self, module: str, tests: list[str]):
        self.module, self.tests = module, tests
        self._going: dict[int, tuple[Mutant | None, float]] = {}

    def start(self, tree: ast.Module, mutant: Mutant | None) -> None:
        """Begins to run the tests on a tree."""
        child = os.fork()
        if child == 0:
            status = 1
            try:
                os.setsid()  # what the tests start ends with them
                status = run_tests(self.module, self.tests, tree, os.open(os.devnull, os.O_WRONLY))
            finally:
                os._exit(status)
        self._going[child] = (mutant, time.monotonic())

    def wait(self, limit: float) -> tuple[Mutant | None, bool, float]:
        """The first to end: its mutant, whether it was killed (also by the limit, in seconds), and its seconds."""
        while True:
            for child, (mutant, began) in list(self._going.items()):
                took = time.monotonic() - began
                ended, status = os.waitpid(child, os.WNOHANG)
                if not ended and took > limit:
                    os.killpg(child, signal.SIGKILL)
                    os.waitpid(child, 0)
                elif not ended:
                    continue
                del self._going[child]
                return mutant, not ended or os.waitstatus_to_exitcode(status) != 0, took
            time.sleep(0.02)

    def __len__(self) -> int:
        return len(self._going)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("module", help="of regvit/, without .py")
    parser.add_argument("--most", type=int, help="mutants to try, drawn by the seed; all where it is left out")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--jobs", type=int, default=2)
    parser.add_argument("--deselect", default="", help="pytest's -k expression for tests to leave out (slow ones)")
    parser.add_argument(
        "--tests", nargs="*", help="test files; tests/test_<module>.py and test_<module>_*.py by default"
    )
    given = parser.parse_args()
    os.chdir(ROOT)
    source = Path(f"regvit/{given.module}.py").read_text(encoding="utf-8")
    own = (Path(f"tests/test_{given.module}.py"), *sorted(Path("tests").glob(f"test_{given.module}_exactly.py")))
    tests = given.tests or [str(file) for file in own]
    tests += ["-k", f"not ({given.deselect})"] if given.deselect else []
    tried = mutants(ast.parse(source))
    total = len(tried)
    if given.most and given.most < total:
        tried = sorted(random.Random(given.seed).sample(tried, given.most), key=lambda one: (one.line, one.node))
    for name in HEAVY:
        importlib.import_module(name)
    assert f"regvit.{given.module}" not in sys.modules and PathFinder.find_spec("regvit") is not None

    runs = Runs(given.module, tests)
    runs.start(ast.parse(source), None)
    _, killed, seconds = runs.wait(600)
    if killed:
        sys.exit(f"the tests of {given.module} fail as it is: python -m pytest {' '.join(tests)}")
    print(f"{given.module}: {len(tried)} of {total} mutants; its tests take {seconds:.1f} s", flush=True)
    waiting, survivors = list(reversed(tried)), []
    while waiting or len(runs):
        while waiting and len(runs) < given.jobs:
            mutant = waiting.pop()
            runs.start(mutated(source, mutant), mutant)
        mutant, killed, _ = runs.wait(5 * seconds + 10)
        if not killed:
            survivors.append(mutant)
            print(f"  survived: {given.module}.py:{mutant.line}  {mutant.change}", flush=True)
    rate = 1 - len(survivors) / len(tried)
    print(f"{given.module}: {len(tried) - len(survivors)} of {len(tried)} mutants killed, {rate:.1%}")
    return int(rate < WANTED)


if __name__ == "__main__":
    sys.exit(main())
