"""What README.md and docs/ tell a reader to type: their commands and Python, found by form."""

import ast
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parent.parent
PROGRAMS = (
    "make", "python", "dvc", "regvit", "git", "pip", "uv", "source", "pytest", "ruff", "curl", "docker", "ray", "aws",
    "sbatch", "srun", "squeue", "salloc", "kubectl", "helm", "ssh", "export",
)  # fmt: skip
LIBRARIES = ("regvit", "torch", "timm", "zarr", "onnxruntime")
SHELL = ("bash", "sh", "console", "shell")
DRAWN = re.compile(r"[─│└├┬┴┼▶]|^\S+ +# <-- ", re.M)  # diagrams and trees of folders
FENCE = re.compile(r"^```([\w-]*)\n(.*?)^```$", re.M | re.S)
SPAN = re.compile(r"(?<!`)`([^`\n]+)`(?!`)")
COMMENT = re.compile(r"\s+#\s.*|^#.*")


@dataclass(frozen=True)
class Block:
    """A fenced block: the page it stands on, its language ("" where it names none), and its text."""

    page: str
    language: str
    text: str

    @property
    def is_shell(self) -> bool:
        return self.language in SHELL or (not self.language and any(map(is_command, self.text.splitlines())))


def pages() -> list[Path]:
    """README.md and the pages of docs/."""
    return [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]


def blocks() -> list[Block]:
    """Every fenced block."""
    return [Block(page.relative_to(ROOT).as_posix(), *found) for page in pages() for found in FENCE.findall(read(page))]


def commands() -> dict[str, str]:
    """`{command: page}` of every shell command, in a block or in the text, without comments; the first page where several
    have it. A block that names its language `bash` or `sh` is one command, as its lines belong together."""
    found: dict[str, str] = {}
    for page in pages():
        name, text = page.relative_to(ROOT).as_posix(), read(page)
        for block in (Block(name, *one) for one in FENCE.findall(text)):
            if block.is_shell:
                lines = logical_lines(block.text)
                for command in ["\n".join(lines)] if block.language else lines:
                    found.setdefault(command, name)
        for span in SPAN.findall(FENCE.sub("", text)):
            if is_command(span):
                found.setdefault(span, name)
    return found


def calls() -> dict[str, str]:
    """`{expression: page}` of every call of a library in the text, such as `regvit.load("folder")`."""
    found: dict[str, str] = {}
    for page in pages():
        for span in SPAN.findall(FENCE.sub("", read(page))):
            if is_call(span):
                found.setdefault(span, page.relative_to(ROOT).as_posix())
    return found


def logical_lines(text: str) -> list[str]:
    """Lines of a shell script without comments, those that go on in the next one joined with it."""
    lines: list[str] = []
    goes_on = False
    for line in (COMMENT.sub("", line).rstrip() for line in text.splitlines()):
        if not line:
            continue
        if goes_on:
            lines[-1] = f"{lines[-1].removesuffix(chr(92)).rstrip()} {line.lstrip()}"
        else:
            lines.append(line)
        goes_on = line.endswith(("\\", "|", "&&"))
    return lines


def is_command(text: str) -> bool:
    """Whether a line begins with the name of a program and says more than that (`make` alone is a command, too)."""
    words = COMMENT.sub("", text).split()
    while words and re.fullmatch(r"[A-Z_]+=\S*", words[0]):  # NAME=value before the program
        del words[0]
    return bool(words) and words[0] in PROGRAMS and (len(words) > 1 or words[0] == "make")


def is_call(text: str) -> bool:
    """Whether a text is Python that calls something of a library."""
    try:
        tree = ast.parse(text, mode="eval").body
    except SyntaxError:
        return False
    return any(map(_calls_a_library, ast.walk(tree)))


def _calls_a_library(node: ast.AST) -> bool:
    function = node.func if isinstance(node, ast.Call) else None
    depth = 0
    while isinstance(function, ast.Attribute):
        function, depth = function.value, depth + 1
    return depth > 0 and isinstance(function, ast.Name) and function.id in LIBRARIES


def read(page: Path) -> str:
    return page.read_text(encoding="utf-8")


def iterate(kind: str) -> Iterator[Block]:
    """Blocks of one language."""
    return (block for block in blocks() if block.language == kind)
