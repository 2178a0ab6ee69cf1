"""One value read as a type within its bounds, or refused in one line that names the key, the value and the rule."""

import dataclasses
import difflib
import math
import re
import types
import typing
from collections.abc import Collection
from typing import Any, Literal, NoReturn

from stages.files.artifacts import Refusal


def refuse_unknown(name: Any, known: Collection[str], path: tuple[str, ...] = ()) -> None:
    if isinstance(name, str) and name in known:
        return
    key = ".".join((*path, name if isinstance(name, str) and re.fullmatch(r"[\w-]+", name) else shown(name)))
    close = difflib.get_close_matches(str(name), known, n=1) if isinstance(name, str) else []
    from stages.settings.schema import leaves  # late: it imports this module

    elsewhere = [leaf for leaf in leaves() if isinstance(name, str) and leaf.endswith(f".{name}")]
    if close:
        hint = f"did you mean {'.'.join((*path, close[0]))}?"
    elif elsewhere:
        hint = f"did you mean {elsewhere[0]}?"
    else:
        hint = f"there are {', '.join(sorted(known))}"
    raise Refusal(f"{key}: no such setting; {hint}")


def read(value: Any, kind: Any, path: tuple[str, ...], bounds: Any) -> Any:
    """The value as `kind`, or a Refusal; `bounds` are those of the field for its numbers."""
    key, origin = ".".join(path), typing.get_origin(kind)
    if dataclasses.is_dataclass(kind):
        return _read_section(value, kind, path)
    if origin in (types.UnionType, typing.Union):
        return _read_either(value, typing.get_args(kind), path, bounds)
    if origin is Literal:
        words = typing.get_args(kind)
        if not isinstance(value, str) or value not in words:
            refuse(key, value, f"must be {_one_of(words)}")
        return value
    if origin is tuple:
        if not isinstance(value, (list, tuple)):
            _refuse_type(key, value, "must be a list, such as [a, b]")
        return tuple(read(item, typing.get_args(kind)[0], path, bounds) for item in value)
    if kind is bool:
        if not isinstance(value, bool):
            _refuse_type(key, value, "must be true or false")
        return value
    if kind is str:
        if not isinstance(value, str) or not (value.strip() or value and "blank" in bounds) or "\0" in value:
            refuse(key, value, "must be a word")
        return value
    return _read_number(value, kind, key, bounds)


def _read_section(value, kind, path):
    if not isinstance(value, dict):
        refuse(".".join(path), value, "must be a mapping of settings")
    hints, fields = typing.get_type_hints(kind), dataclasses.fields(kind)
    names = [field.name for field in fields]
    for name in value:
        refuse_unknown(name, names, path)
    for name in names:
        if name not in value:
            refuse_missing((*path, name))
    return kind(**{f.name: read(value[f.name], hints[f.name], (*path, f.name), f.metadata) for f in fields})


def _read_either(value, kinds, path, bounds):
    if value is None and type(None) in kinds:
        return None
    kinds = [kind for kind in kinds if kind is not type(None)]
    words = [word for kind in kinds if typing.get_origin(kind) is Literal for word in typing.get_args(kind)]
    if isinstance(value, str) and value in words:
        return value
    if words and (isinstance(value, bool) or not isinstance(value, (int, float))):
        _refuse_type(".".join(path), value, f"must be {_one_of(words)} or a number")
    return read(value, kinds[0], path, bounds)


def _read_number(value, kind, key, bounds):
    if isinstance(value, bool) or not isinstance(value, int if kind is int else (int, float)):
        _refuse_type(key, value, "must be a whole number" if kind is int else "must be a number")
    if isinstance(value, float) and not math.isfinite(value):
        refuse(key, value, "must be a finite number")
    low, high, above = bounds["low"], bounds["high"], bounds["above"]
    if value < low or value > high or (above and value == low):
        floor = f"above {low:g}" if above else f"at least {low:g}"
        rule = floor if value <= low else f"at most {high:,}"
        refuse(key, value, f"must be {rule}")
    return kind(value)


def refuse(key: str, value: Any, rule: str) -> NoReturn:
    raise Refusal(f"{key} = {shown(value)}: {rule}")


def _refuse_type(key, value, rule):
    """Text where something else is needed stands in quotes; what would be right without them comes with a way there."""
    if not isinstance(value, str):
        refuse(key, value, rule)
    hint = ""
    if re.fullmatch(r"true|false|[-+]?[\d.]+(e[-+]?\d+)?", value.strip(), re.ASCII | re.IGNORECASE):
        hint = ", and this is text: write it without quotes"
    raise Refusal(f"{key} = {_cut(repr(value))}: {rule}{hint}")


def refuse_missing(path: tuple[str, ...]) -> NoReturn:
    raise Refusal(f"{'.'.join(path)}: missing; put it in params.yaml or in a preset of conf/")


def _one_of(words):
    return " or ".join(words) if len(words) < 3 else "one of " + ", ".join(words)


def shown(value: Any) -> str:
    """The value as a person wrote it, short and on one line."""
    try:
        plain_word = isinstance(value, str) and re.fullmatch(r"[\w./:-]+", value, re.ASCII)
        text = value if plain_word else repr(value)
    except (ValueError, RecursionError):  # an integer of thousands of digits, a bottomless list
        text = f"a very large {type(value).__name__}"
    return _cut(text)


def _cut(text):
    text = " ".join(text.split())
    return text if len(text) <= 80 else text[:77] + "..."
