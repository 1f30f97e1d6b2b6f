"""Values as a person writes them: `key=value` texts, and their conversion to the type that a setting has."""

import difflib
import math
import types
import typing
from collections.abc import Iterable, Mapping
from enum import Enum
from typing import Any, Literal

import yaml

from dyadlm.errors import UserError


def parse_assignment(text: str, form: str = "key=value") -> tuple[str, Any]:
    """`key=value`, the value read as YAML. Raises `UserError`, naming the form, if it is no such thing."""
    key, sign, value = text.partition("=")
    if not sign or not key.strip():
        raise UserError(f"--set takes {form}, not {text!r}.")
    try:
        return key.strip(), yaml.safe_load(value)
    except yaml.YAMLError as error:
        raise UserError(f"The value of {key.strip()} cannot be read: {value!r}.") from error


def coerce(value: Any, annotation: Any, key: str) -> Any:
    """`value` as the type that `annotation` asks for; raises `UserError`, naming the key, if it is no such thing.

    annotation: a type, a union, a `Literal`, an `Enum`, or a list or tuple of these. Of a union the first type that
    fits is taken. A whole number stays one where a float is asked for.
    """
    if typing.get_origin(annotation) is Literal:
        literals = typing.get_args(annotation)
        if value is False and "off" in literals:  # as YAML reads it
            return "off"
        if value in literals:
            return value
        raise UserError(f"{key} cannot be {value!r}{nearest(value, literals)}.")
    for kind in _members(annotation):
        origin = typing.get_origin(kind) or kind
        if origin is Any or (origin is type(None) and value is None):
            return value
        if isinstance(origin, type) and issubclass(origin, Enum):
            choices = [member.value for member in origin]
            if value in choices:
                return value
            raise UserError(f"{key} cannot be {value!r}{nearest(value, choices)}.")
        if origin is bool and isinstance(value, bool):
            return value
        if origin is int and isinstance(value, int) and not isinstance(value, bool):
            return value
        if origin is int and isinstance(value, str) and value.strip().lstrip("+-").isdecimal():
            return int(value)
        if origin is int and _number(value) is not None and float(value) == int(float(value)):
            return int(float(value))
        if origin is float and _number(value) is not None:
            return value if isinstance(value, int) else float(value)
        if origin in (list, tuple) and isinstance(value, list | tuple):
            entries = typing.get_args(kind)[:1]
            return [coerce(entry, entries[0], key) if entries else entry for entry in value]
        if origin in (str, dict) and isinstance(value, origin):
            return value
    raise UserError(f"{key} cannot be {value!r}; it takes {_names(annotation)}.")


def coerce_fields(given: Mapping[str, Any], types_of: Mapping[str, Any], what: str, prefix: str = "") -> dict[str, Any]:
    """Each field of a configuration as the type it has. types_of: the type of every field there is.

    what: whose fields they are, as the subject of a sentence. prefix: of a field in messages.
    Raises `UserError` for a field that there is not, naming the nearest, and for a value of another type.
    """
    for name in given:
        if name not in types_of:
            near = difflib.get_close_matches(name, types_of, n=1)
            hint = f"; the nearest is {near[0]}" if near else ""
            raise UserError(f"{what} has no field {name!r}{hint}.")
    return {name: coerce(value, types_of[name], prefix + name) for name, value in given.items()}


def type_of(value: Any) -> Any:
    """The type that a new value of a field may have, by the value that the field has now. None always fits."""
    if value is None:
        # Nothing says more of the field than this. YAML reads 1e-5 as a text, so a text that is a number is one.
        return bool | int | float | Any
    if isinstance(value, bool):
        return bool | None
    if isinstance(value, float):
        return float | None
    if isinstance(value, int):
        return int | float | None
    if isinstance(value, list | tuple):
        kinds = [kind for entry in value for kind in _members(type_of(entry))]
        # typing.Union of what is only known here cannot be written with |.
        union: Any = typing.Union[tuple(kinds)] if kinds else Any  # noqa: UP007
        return list[union] | None
    return type(value) | None


def nearest(name: Any, known: Iterable[str]) -> str:
    """The end of a sentence that refuses a name: the nearest of those there are, or all if they are few."""
    known = list(known)
    found = difflib.get_close_matches(str(name), known, n=1)
    if found:
        return f"; the nearest is {found[0]}"
    return f"; choose one of {', '.join(sorted(known))}" if len(known) <= 12 else ""


def _members(annotation: Any) -> tuple[Any, ...]:
    """The types of a union, or the one type."""
    union = isinstance(annotation, types.UnionType) or typing.get_origin(annotation) is typing.Union
    return typing.get_args(annotation) if union else (annotation,)


def _number(value: Any) -> float | None:
    """YAML reads 1e-3 as a text, so texts that are numbers count."""
    if isinstance(value, bool) or not isinstance(value, int | float | str):
        return None
    try:
        number = float(value)
    except (ValueError, OverflowError):
        return None
    return number if math.isfinite(number) else None


def _names(annotation: Any) -> str:
    words = {bool: "true or false", int: "a whole number", float: "a number", str: "a text", list: "a list"}
    words[type(None)] = "null"

    def name(kind: Any) -> str:
        origin, entries = typing.get_origin(kind) or kind, typing.get_args(kind)[:1]
        if origin in (list, tuple) and entries:
            return f"a list, each entry {' or '.join(map(name, _members(entries[0])))}"
        return words.get(origin, getattr(origin, "__name__", str(origin)))

    return " or ".join(map(name, _members(annotation)))
