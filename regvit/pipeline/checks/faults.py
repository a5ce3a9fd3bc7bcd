"""What pydantic found wrong, as a person wants to read it: one line a fault, with the value, what was expected, and the cure."""

import difflib
import re
import reprlib
from collections.abc import Iterable, Sequence
from typing import get_args

from pydantic import BaseModel, ValidationError

QUOTED = re.compile("'([^']+)'")
PHRASES = {  # what pydantic says: what follows "x is 3, expected "
    r"^Value error, (expected )?": "",
    r"^\w+ should (be )?": "",
    r"^have": "to have",
    r"^match pattern '\^(.*)'$": r"to match \1",
    r" after validation, not \d+$": "",
    r"a valid dictionary or instance of \w+": "a block of keys",
    "a valid integer.*": "a whole number",
    "a valid number.*": "a number",
}


_short = reprlib.Repr()
_short.maxlevel, _short.maxstring, _short.maxother = 3, 200, 200


def shown(value: object) -> str:
    """A value in a message, of bounded length whatever the file holds."""
    try:
        return _short.repr(value)
    except ValueError:  # Python writes no more than 4,300 digits
        return "a number of thousands of digits"


def nearest(word: object, known: Iterable[str]) -> str:
    """`: did you mean 'other'?`, or nothing where no known word is near."""
    close = difflib.get_close_matches(word, list(known), n=1) if isinstance(word, str) else []
    return f": did you mean {close[0]!r}?" if close else ""


def sentences(error: ValidationError, model: type[BaseModel]) -> list[str]:
    """One line for each fault that pydantic found in values of the model."""
    return [_sentence(fault["loc"], fault["type"], fault["msg"], fault["input"], model) for fault in error.errors()]


def _sentence(place: Sequence[str | int], kind: str, message: str, value: object, model: type[BaseModel]) -> str:
    where = "".join(f"[{part}]" if isinstance(part, int) else f".{part}" for part in place if part != "[key]")
    where = where.removeprefix(".") or "the file"
    if kind == "missing":
        return f"{where} is missing: add it"
    if kind == "extra_forbidden":
        known = _block_at(place[:-1], model).model_fields
        return f"unknown key {where}{nearest(place[-1], known) or ': known are ' + ', '.join(known)}"
    if place[-1:] == ("[key]",) and kind == "value_error":
        return f"{where} {message.removeprefix('Value error, ')}"
    for pattern, words in PHRASES.items():
        message = re.sub(pattern, words, message)
    return f"{where} is {shown(value)}{nearest(value, QUOTED.findall(message)) or ', expected ' + message}"


def _block_at(place: Sequence[str | int], model: type[BaseModel]) -> type[BaseModel]:
    """The model of the block at a path of keys, of which some are names of entries."""
    for key in place:
        if key in model.model_fields:
            model = next(_models_in(model.model_fields[key].annotation), model)
    return model


def _models_in(annotation: object) -> Iterable[type[BaseModel]]:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        yield annotation
    for part in get_args(annotation):
        yield from _models_in(part)
