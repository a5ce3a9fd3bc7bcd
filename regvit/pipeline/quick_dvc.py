"""`dvc`, whose dvc.lock is read by the YAML parser in C.

DVC reads and writes dvc.lock after every stage. It reads it by the parser in Python that keeps comments, of which there are
none in that file; so what this takes grows with the square of the number of stages, and in a pipeline of some hundred small
stages is most of the time. What is written is the same, to the byte.
"""

import sys
from pathlib import Path

from dvc.cli import main
from dvc.utils.serialize import _yaml

for_update = _yaml.parse_yaml_for_update


def parse(text: str, path: str) -> dict:
    """What a file that DVC is about to change holds: of dvc.lock without places for comments."""
    return _yaml.parse_yaml(text, path) if Path(path).name == "dvc.lock" else for_update(text, path)


if __name__ == "__main__":
    _yaml.parse_yaml_for_update = parse
    sys.exit(main())
