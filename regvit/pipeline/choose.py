"""Picks a whole experiment: `python -m regvit.pipeline.choose <choice> [--images FOLDER]` (`make choose NAME=cifar10`).

A choice is a file of choices/ that names only what differs. Its blocks of named entries (datasets, scenes, backbones,
runs) take the place of those in params.yaml, as text, with their comments; of every other block only the keys that it
names do. What other choices name goes back to the default first, so that what was chosen before does not matter;
settings that no choice names stay yours. `{images}` stands for the folder where your images lie. `--list` says which
choices there are.
"""

import argparse
import re
import sys
from collections.abc import Iterator
from pathlib import Path

from ruamel.yaml import YAML

from regvit.files import write_text
from regvit.pipeline.params import ParamsError, faults_of

CHOICES = Path("choices")
DEFAULT = "emoji"  # names all that the others do
NAMED = ("datasets", "scenes", "backbones", "runs")  # blocks whose entries belong together
LISTS = ("backbones",)  # files of choices/ to copy from, that are no experiment


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
    before = given.params.read_text(encoding="utf-8")
    after = merge(merge(before, read_choice(DEFAULT, None)), read_choice(given.choice, given.images))
    if faults := list(faults_of(load(after))):
        raise BadChoice(f"choice {given.choice} would leave {given.params} with faults:\n  - " + "\n  - ".join(faults))
    write_text(given.params, after)
    changes = list(differences(load(before), load(after)))
    print("\n".join([f"{given.params}: {given.choice}", *(changes or ["  nothing changes"])]))


def choices() -> list[tuple[str, str]]:
    """(name, what its first comment says) of every choice."""
    files = sorted(file for file in CHOICES.glob("*.yaml") if file.stem not in LISTS)
    return [(file.stem, file.read_text(encoding="utf-8").splitlines()[0].lstrip("# ")) for file in files]


def read_choice(name: str, images: str | None) -> str:
    """The text of a choice, with the folder of images filled in."""
    known = [known for known, _ in choices()]
    if name not in known:
        raise BadChoice(f"there is no choice {name!r}; there are {', '.join(known)}")
    text = (CHOICES / f"{name}.yaml").read_text(encoding="utf-8")
    wanted = re.findall(r"\{images\}([^\s\"':]+)", text)
    if wanted and not images:
        raise BadChoice(f"choice {name} reads images of yours: say --images FOLDER (make: IMAGES=FOLDER), the folder "
                        f"that holds {', '.join(dict.fromkeys(one.strip('/') for one in wanted))}")  # fmt: skip
    folder = str(Path(images).expanduser().absolute()) if images else ""
    if '"' in folder or "\\" in folder:
        raise BadChoice(f"{folder} has a quote or a backslash, which YAML would misread; rename or link the folder")
    return text.replace("{images}", folder)


def load(text: str) -> dict:
    return YAML(typ="safe", pure=True).load(text)


def merge(text: str, overlay: str) -> str:
    """The parameters with the overlay's blocks and keys in the place of their own."""
    known, values = sections(text), load(overlay)
    for key, block in sections(overlay).items():
        if key not in known:
            raise BadChoice(f"params.yaml has no {key!r}; a choice changes what is there")
        new = block
        if key not in NAMED and isinstance(values[key], dict):
            new, there = known[key], sections(known[key], inside=key)
            for inner, lines in sections(block, inside=key).items():
                if inner not in there:
                    raise BadChoice(f"params.yaml has no {key}.{inner}; a choice changes what is there")
                new = new.replace(there[inner], lines, 1)
        text = f"\n{text}".replace(f"\n{known[key]}", f"\n{new}", 1)[1:]
    return text


def sections(text: str, inside: str | None = None) -> dict[str, str]:
    """The lines of each key, from the one it stands on to the last that is part of its value.

    Args:
        inside: a key whose own keys are wanted; `text` is then its section.
    """
    loaded = YAML(pure=True).load(text)  # with line numbers
    block = loaded if inside is None else loaded[inside]
    lines = text.splitlines(keepends=True)
    starts = {key: block.lc.key(key)[0] for key in block}
    if len(set(starts.values())) < len(starts) or (inside is not None and min(starts.values()) == 0):
        raise BadChoice(f"the keys of {inside or 'the file'} share a line; give each its own")
    found, ends = {}, [*sorted(starts.values())[1:], len(lines)]
    for (key, start), end in zip(sorted(starts.items(), key=lambda item: item[1]), ends, strict=True):
        while end > start + 1 and re.match(r"\s*(#|$)", lines[end - 1]):  # comments belong to what follows
            end -= 1
        found[key] = "".join(lines[start:end])
    return found


def differences(before: dict, after: dict) -> Iterator[str]:
    """One line for each block of named entries, and for each other value, that changes."""
    for key in after:
        old, new = before.get(key), after[key]
        if old == new:
            continue
        if key in NAMED:
            yield f"  {key}: {', '.join(old) or 'none'} -> {', '.join(new) or 'none'}"
        elif isinstance(new, dict) and isinstance(old, dict):
            yield from (f"  {key}.{k}: {shown(old.get(k))} -> {shown(v)}" for k, v in new.items() if old.get(k) != v)
        else:
            yield f"  {key}: {shown(old)} -> {shown(new)}"


def shown(value: object) -> str:
    return "null" if value is None else ", ".join(map(str, value)) if isinstance(value, list) else str(value)


if __name__ == "__main__":
    try:
        main()
    except (BadChoice, ParamsError) as error:
        sys.exit(f"choose: {error}")
