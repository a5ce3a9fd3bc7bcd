"""Reads params.yaml and says plainly what is wrong with it: `python -m regvit.pipeline.params`, `make check`, and every stage.

DVC reads YAML 1.2 (`1e-4` is a number, `yes` a word), PyYAML reads 1.1 (`1e-4` is a word, `yes` is true). A stage
that used PyYAML could compute with something else than what DVC tracks, so ruamel.yaml reads it here, as in DVC.
"""

import io
import sys
from pathlib import Path

from pydantic import ValidationError
from ruamel.yaml import YAML
from ruamel.yaml.error import YAMLError

from regvit.pipeline.checks.faults import nearest, sentences
from regvit.pipeline.checks.references import broken_layers, broken_references, broken_sources
from regvit.pipeline.checks.source_changes import changed_sources
from regvit.pipeline.command import show_anything
from regvit.pipeline.schema import Block, Images, Params


class ParamsError(ValueError):
    """params.yaml cannot be used; the message lists every fault with its value, what was expected and the cure."""


def load_params(path: str | Path = "params.yaml") -> Params:
    """The parameters of the working directory, checked as a whole.

    Raises:
        ParamsError: the file is missing or is not YAML, or a key or value is wrong.
    """
    values = read_values(path)
    _refuse(path, faults_of(values))
    return Params.model_validate(values)


def check_params(path: str | Path = "params.yaml") -> Params:
    """As `load_params`, for what is looked at before a pipeline and not before each stage.

    Raises:
        ParamsError: as `load_params`, or DVC could not read the file, be it after `dvc exp run -S` has written it anew; or
            timm does not know an architecture, or one has fewer layers.
        OSError: what timm said of an architecture cannot be kept in work/.
    """
    params = load_params(path)
    text = _text_of(path)
    for as_dvc_reads in (text, _as_dvc_writes_it(text)):
        try:
            YAML(typ="safe").load(as_dvc_reads)
        except YAMLError as error:
            raise ParamsError(
                f"{path} cannot be read by DVC ({' '.join(str(error).split())}): in braces and brackets it reads a colon "
                "(emoji:noto) only in quotes, and `dvc exp run -S` takes quotes away: write this entry a key a line"
            ) from error
    _refuse(path, [*broken_sources(params), *broken_layers(params)])
    return params


def read_values(path: str | Path) -> object:
    """What the file holds as plain dicts, lists and scalars, not yet checked.

    Raises:
        ParamsError: the file is missing or is not YAML.
    """
    if not Path(path).is_file():
        raise ParamsError(f"there is no {path} in {Path.cwd()}: stages run from the root of the repository")
    try:
        return YAML(typ="safe", pure=True).load(io.StringIO(_text_of(path)))  # a stream: messages quote no line
    except (YAMLError, ValueError, OverflowError) as error:  # ValueError: of a 13th month, of 5,000 digits
        raise ParamsError(f"{path} is not YAML: {' '.join(str(error).split())}") from error
    except RecursionError as error:
        raise ParamsError(f"{path} has too many lists or blocks within each other: take levels away") from error


def faults_of(values: object) -> list[str]:
    """One sentence a fault: first of single values, and only if these are right, of what refers to what."""
    try:
        return list(broken_references(Params.model_validate(values)))
    except ValidationError as error:
        return sentences(error, Params)


def entry_of(params: Params, block: str, name: str) -> Block:
    """One named entry of a block.

    Raises:
        ParamsError: there is none of that name; the message gives the nearest one.
    """
    entries = getattr(params, block)
    if name not in entries:
        raise ParamsError(
            f"{block} of params.yaml has no {name!r}{nearest(name, entries) or ': there are ' + ', '.join(entries)}"
        )
    return entries[name]


def source_of(params: Params, name: str) -> Images:
    """The entry of a data set, be it of `datasets` or of `scenes`.

    Raises:
        ParamsError: neither has that name; the message gives the nearest one.
    """
    known = params.datasets | params.scenes
    if name not in known:
        raise ParamsError(f"there is no data set {name!r} in params.yaml{nearest(name, known)}")
    return known[name]


def _text_of(path: str | Path) -> str:
    try:
        return Path(path).read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise ParamsError(
            f"{path} is not UTF-8 text ({error.reason} at byte {error.start}): save it as UTF-8"
        ) from error


def _as_dvc_writes_it(text: str) -> str:
    """The file after `dvc exp run -S`, which takes quotes away."""
    round_trip, written = YAML(), io.StringIO()
    round_trip.dump(round_trip.load(text), written)
    return written.getvalue()


def _refuse(path: str | Path, faults: list[str]) -> None:
    if faults:
        raise ParamsError(f"{path} has {len(faults)} fault(s):\n" + "\n".join(f"  - {fault}" for fault in faults))


def main() -> None:
    try:
        params = check_params()
    except (ParamsError, OSError) as error:
        sys.exit(str(error))
    print("params.yaml: no fault found")
    for stage in changed_sources(params):
        print(f"{stage}: its source is no longer the one that it was made of; make repro makes it again")


if __name__ == "__main__":
    show_anything()
    main()
