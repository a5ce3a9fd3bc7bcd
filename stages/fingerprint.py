"""fingerprint: the code that each stage runs, by SHA-256; metrics/fingerprint/<script>.json.

A stage depends on the file of its script, so that editing a module reruns the stages that import it, directly or not, and
no others. Naming every room of regvit/ with every stage would say less, and have DVC read a lock file twice as long.
"""

import hashlib
import json
from functools import cache
from modulefinder import ModuleFinder
from pathlib import Path

from regvit.pipeline.command import command

OUT = Path("metrics/fingerprint")
PARAMETERS = "regvit/pipeline/"  # reads them, and DVC tracks their values
CHECKS = "regvit.pipeline.checks"  # of them


def main() -> None:
    OUT.mkdir(parents=True, exist_ok=True)
    for script in sorted(Path("stages").glob("*.py")):
        found = {file: digest(file) for file in code_of(script)}
        (OUT / f"{script.stem}.json").write_text(json.dumps(found, indent=1) + "\n")


def code_of(script: Path) -> list[str]:
    """The script and the files of the project that it imports, wherever in them, relative to this folder; sorted."""
    finder = ModuleFinder(path=["."], excludes=[CHECKS])
    finder.add_module("regvit").__path__ = ["regvit"]  # without what it imports for type checkers alone
    finder.run_script(str(script))
    files = [Path(module.__file__) for module in finder.modules.values() if module.__file__]
    names = {file.resolve().relative_to(Path.cwd()).as_posix() for file in files}
    return sorted(name for name in names if not name.startswith(PARAMETERS))


@cache
def digest(file: str) -> str:
    return hashlib.sha256(Path(file).read_bytes()).hexdigest()[:16]


if __name__ == "__main__":
    command(main, interrupted="metrics/fingerprint is not finished")
