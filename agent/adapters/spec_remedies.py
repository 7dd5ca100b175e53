"""What to do about a field that the spec's schema refuses: the remedy half of a `SpecError`."""

from __future__ import annotations

import difflib
import types
import typing
from collections.abc import Mapping
from datetime import date
from functools import cache
from typing import Any

from pydantic import BaseModel

from agent.domain.specs import Spec
from trainer.config import UNKNOWN_PRESET, TrainerSettings

Path = tuple[str | int, ...]

_BY_TYPE = {
    "missing": "add it",
    "value_error": "",
    "int_parsing": "give a whole number, such as 1000",
    "int_type": "give a whole number, such as 1000",
    "int_from_float": "give a whole number, such as 1000",
    "float_parsing": "give a number, such as 0.02",
    "float_type": "give a number, such as 0.02",
    "finite_number": "give a finite number",
    "bool_parsing": "give true or false",
    "bool_type": "give true or false",
    "tuple_type": "give a list, such as [1, 2]",
    "list_type": "give a list, such as [1, 2]",
    "dict_type": "give `name: value` lines, indented below it",
    "model_type": "give `field: value` lines, indented below it",
    "model_attributes_type": "give `field: value` lines, indented below it",
    "string_too_long": "shorten it",
    "too_short": "give at least one",
    "too_long": "give fewer",
}


def remedy_for(kind: str, location: Path, given: object, context: Mapping[str, Any]) -> str:
    """The remedy for one pydantic error of `kind` at `location`; empty where the message says it all."""
    if kind == "extra_forbidden":
        return _for_unknown_field(location)
    if kind == "string_type":
        if given is None:
            return "give a text, or leave the field out"
        return "put the value in quotes" if isinstance(given, str | int | float | date) else "give a text"
    if kind == "string_pattern_mismatch":
        if "[key]" in location or "env" in location[:1]:
            return "use letters, digits and underscores, not starting with a digit"
        return "use lower-case letters, digits, dot, dash and underscore, at most 64, starting with a letter or digit"
    if kind == "literal_error":
        return _closest(str(given), _quoted(str(context.get("expected", ""))))
    if kind == UNKNOWN_PRESET:
        return _closest(str(context["name"]), str(context["names"]).split(", "))
    if kind in {"greater_than", "greater_than_equal", "less_than", "less_than_equal"}:
        bound = next(iter(context.values()), "")
        words = {"greater_than": "above", "greater_than_equal": "at least", "less_than": "below"}.get(kind, "at most")
        return f"give a value {words} {bound}"
    if kind == "tuple_type" and location[:1] == ("command",):
        return "give a list of arguments, such as [python, train.py]; no shell reads it"
    if kind == "tuple_type" and isinstance(given, str | int | float):
        return f"give a list: [{given}]"
    if kind.startswith(("int_", "float_")) and isinstance(given, str) and "," in given:
        return "write the number without commas; underscores may part the digits: 1_000_000"
    return _BY_TYPE.get(kind, "correct the value")


def _for_unknown_field(location: Path) -> str:
    name, section = str(location[-1]), location[:-1]
    here = _fields_of(section)
    if close := difflib.get_close_matches(name, here, n=1, cutoff=0.7):
        return f"did you mean `{close[0]}`?"
    if elsewhere := _places().get(name):
        return f"it belongs under {' or '.join(elsewhere)}"
    if close := difflib.get_close_matches(name, here, n=1, cutoff=0.5):
        return f"did you mean `{close[0]}`? Otherwise remove it"
    known = f"; known here: {', '.join(here)}" if here else ""
    return f"remove it{known}"


def _closest(given: str, allowed: list[str]) -> str:
    close = difflib.get_close_matches(given, allowed, n=1, cutoff=0.5)
    return f"did you mean `{close[0]}`?" if close else f"give one of {', '.join(allowed)}"


def _quoted(expected: str) -> list[str]:
    return expected.split("'")[1::2]


def _fields_of(section: Path) -> list[str]:
    model: type[BaseModel] | None = Spec
    for part in section:
        if model is None or not isinstance(part, str) or part not in model.model_fields:
            return []
        model = _model_in(model.model_fields[part].annotation)
    return _names_in(model) if model is not None else []


def _names_in(model: type[BaseModel]) -> list[str]:
    """What may stand in a section: its fields, and the preset that a trainer's settings may begin from."""
    return [*model.model_fields, *(["preset"] if issubclass(model, TrainerSettings) else [])]


def _model_in(annotation: object) -> type[BaseModel] | None:
    """The section that a field holds, if it holds one, optional or not."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return annotation
    if typing.get_origin(annotation) in {typing.Union, types.UnionType}:
        return next(filter(None, map(_model_in, typing.get_args(annotation))), None)
    return None


@cache
def _places() -> dict[str, list[str]]:
    """Every field name of every section, with the sections that have it."""
    places: dict[str, list[str]] = {}

    def visit(model: type[BaseModel], path: str) -> None:
        for name in _names_in(model):
            places.setdefault(name, []).append(f"`{path}:`" if path else "the top level")
        for name, info in model.model_fields.items():
            if inner := _model_in(info.annotation):
                visit(inner, f"{path}.{name}" if path else name)

    visit(Spec, "")
    return places
