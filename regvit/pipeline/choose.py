"""Picks a whole experiment: `python -m regvit.pipeline.choose <choice> [--images FOLDER]` (`make choose NAME=cifar10`).

A choice is a file of choices/ that names only what differs. Its blocks of named entries (datasets, scenes, backbones,
runs) take the place of those in params.yaml, with their comments; of every other block only the keys that it names do.
What other choices name goes back to the default first, so that what was chosen before does not matter; settings that no
choice names stay yours. `{images}` stands for the folder where your images lie. `--list` says which choices there are.
"""

import argparse
import io
import re
import sys
from pathlib import Path

from ruamel.yaml import YAML
from ruamel.yaml.comments import CommentedMap

from regvit.files import write_text
from regvit.pipeline.checks.references import broken_sources
from regvit.pipeline.command import show_anything
from regvit.pipeline.params import ParamsError, faults_of, read_values
from regvit.pipeline.schema import Params

CHOICES = Path("choices")
DEFAULT = "emoji"  # names all that the others do
NAMED = ("datasets", "scenes", "backbones", "runs")  # blocks whose entries belong together
LISTS = ("backbones",)  # files of choices/ to copy from, that are no experiment
ROUND_TRIP = YAML()  # keeps comments
ROUND_TRIP.preserve_quotes, ROUND_TRIP.width = True, 4096
ROUND_TRIP.representer.add_representer(
    type(None), lambda dumper, _: dumper.represent_scalar("tag:yaml.org,2002:null", "null")
)


class BadChoice(ValueError):
    """A choice that does not exist, or cannot be merged; the message gives the cure."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("choice", nargs="?", help="a file of choices/, without .yaml")
    parser.add_argument("--images", help="the folder where your images lie, for choices that read them")
    parser.add_argument("--list", action="store_true", help="say which choices there are")
    parser.add_argument("--params", type=Path, default=Path("params.yaml"), help="the file to change (params.yaml)")
    given = parser.parse_args()
    if given.list or given.choice is None:
        print("\n".join(f"{name:<12}{about}" for name, about in choices()))
        return
    before = read_values(given.params)
    merged = ROUND_TRIP.load(given.params.read_text(encoding="utf-8"))
    for name in (DEFAULT, given.choice):
        merge(merged, ROUND_TRIP.load(read_choice(name, given.images if name == given.choice else None)))
    text = io.StringIO()
    ROUND_TRIP.dump(merged, text)
    text = re.sub(r"(?m)^( .*\n)(?=\S)", r"\1\n", text.getvalue())  # blocks stay apart
    text = re.sub(r"(?<=\S) {2,}#", " #", re.sub(r"\n{3,}", "\n\n", text))
    after = YAML(typ="safe", pure=True).load(text)
    if faults := faults_of(after) or list(broken_sources(Params.model_validate(after))):
        raise BadChoice(f"choice {given.choice} would leave {given.params} with faults:\n  - " + "\n  - ".join(faults))
    write_text(given.params, text)
    print(
        f"{given.params}: {given.choice}"
        + (", as it was" if after == before else "; `dvc params diff` shows what changed")
    )


def choices() -> list[tuple[str, str]]:
    """(name, what its first comment says) of every choice."""
    files = sorted(file for file in CHOICES.glob("*.yaml") if file.stem not in LISTS)
    return [(file.stem, file.read_text(encoding="utf-8").splitlines()[0].lstrip("# ")) for file in files]


def read_choice(name: str, images: str | None) -> str:
    """The text of a choice, with the folder of images filled in.

    Raises:
        BadChoice: there is none of that name, or the folder is missing or cannot stand in YAML.
    """
    known = [known for known, _ in choices()]
    if name not in known:
        raise BadChoice(f"there is no choice {name!r}; there are {', '.join(known)}")
    text = (CHOICES / f"{name}.yaml").read_text(encoding="utf-8")
    if "{images}" in text and not images:
        holds = ", ".join(dict.fromkeys(re.findall(r"\{images\}/([^\s\"':]+)", text))) or "them"
        raise BadChoice(
            f"choice {name} reads images of yours: say --images FOLDER (make: IMAGES=FOLDER), which holds {holds}"
        )
    folder = str(Path(images).expanduser().absolute()) if images else ""
    if '"' in folder or "\\" in folder:
        raise BadChoice(f"{folder} has a quote or a backslash, which YAML would misread; rename or link the folder")
    return text.replace("{images}", folder)


def merge(params: CommentedMap, overlay: CommentedMap) -> None:
    """Puts the overlay's blocks and keys in the place of the parameters' own.

    Raises:
        BadChoice: the parameters have no such block or key.
    """
    for key, new in overlay.items():
        if key not in params:
            raise BadChoice(f"params.yaml has no {key!r}; a choice changes what is there")
        if key in NAMED or not isinstance(new, dict):
            params[key] = new
            params.ca.items.pop(key, None)  # the comment on the key's line
            params.ca.items.update({key: overlay.ca.items[key]} if key in overlay.ca.items else {})
            continue
        for inner, value in new.items():
            if inner not in params[key]:
                raise BadChoice(f"params.yaml has no {key}.{inner}; a choice changes what is there")
            params[key][inner] = value


if __name__ == "__main__":
    show_anything()
    try:
        main()
    except (BadChoice, ParamsError) as error:
        sys.exit(f"choose: {error}")
