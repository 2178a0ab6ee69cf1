"""Ledgers: YAML files of rows under conf/plan/. A bad row is refused in one line: file, row, field, cure."""

import difflib
import re
import typing
from pathlib import Path
from typing import Annotated, Any, TypeVar

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from stages.files.artifacts import Refusal
from stages.settings.reading import RULES, shown

DATES = {"date_type": "must be a date such as 2025-01-31, without quotes"}


class Row(BaseModel):
    """Unknown fields, wrong types, NaN and infinity are refused."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, allow_inf_nan=False)


class SourcedRow(Row):
    """A row of published values. `assumed` names the fields that its source does not confirm."""

    assumed: Annotated[tuple[str, ...], Field(strict=False)] = ()

    @model_validator(mode="after")
    def _assumes_own_fields(self):
        unknown = [name for name in self.assumed if name not in type(self).model_fields]
        if unknown:
            raise ValueError(f"assumed: {unknown[0]} is no field of the row; name a field")
        return self


R = TypeVar("R", bound=Row)


class _OneMeaning(yaml.SafeLoader):
    """A key that stands twice in one mapping is refused: the first value would be lost without a word."""

    def construct_mapping(self, node: Any, deep: bool = False) -> dict[Any, Any]:
        keys = [key.value for key, _ in node.value if isinstance(key, yaml.ScalarNode)]
        twice = next((key for key in keys if keys.count(key) > 1), None)
        if twice is not None:
            raise yaml.constructor.ConstructorError(None, None, f"the key {twice} stands twice", node.start_mark)
        return super().construct_mapping(node, deep)

    def construct_object(self, node: Any, deep: bool = False) -> Any:
        """A date that does not exist, an integer of thousands of digits: with its line."""
        try:
            return super().construct_object(node, deep)
        except ValueError as error:
            problem = f"{shown(node.value)}: {str(error).splitlines()[0]}"
            raise yaml.constructor.ConstructorError(None, None, problem, node.start_mark) from None


# YAML 1.1 takes 671e9 for text; people write it and mean a number
_OneMeaning.add_implicit_resolver(
    "tag:yaml.org,2002:float", re.compile(r"[-+]?\d+(\.\d*)?[eE][-+]?\d+$"), list("-+0123456789")
)


def load_ledger(path: str | Path) -> Any:
    """The YAML of a file; what is missing or no YAML is refused by name."""
    path = Path(path)
    try:
        loader = _OneMeaning(path.read_text(encoding="utf-8"))
        try:
            return loader.get_single_data()
        finally:
            loader.dispose()
    except FileNotFoundError:
        raise Refusal(f"{path}: there is no such file; name one that exists") from None
    except OSError as error:
        raise Refusal(f"{path}: cannot be read ({error.strerror}); name a readable file of YAML") from None
    except (yaml.YAMLError, UnicodeDecodeError, RecursionError, ValueError) as error:
        mark = getattr(error, "problem_mark", None)
        line = f", line {mark.line + 1}" if mark else ""
        problem = getattr(error, "problem", None) or str(error).splitlines()[0] or "nested too deep"
        raise Refusal(f"{path}{line}: not YAML ({problem}); write a list of rows in YAML") from None


def row_of(kind: type[R], values: Any, place: str) -> R:
    """The row with its values checked; `place` is the file and the row, such as "points.yaml: row a7"."""
    if not isinstance(values, dict):
        raise Refusal(f"{place}: {shown(values)}: must be a mapping of fields; write `- {{id: ..., ...}}`")
    try:
        return kind.model_validate(values)
    except ValidationError as error:
        raise Refusal(f"{place}: {_first_mistake(error, kind)}") from None


def _fields_at(place, kind):
    """The fields of a row, or of the mapping inside it where pydantic found the mistake."""
    for name in place:
        inner = kind.model_fields[name].annotation if isinstance(name, str) and name in kind.model_fields else None
        found = [each for each in (inner, *typing.get_args(inner)) if isinstance(each, type) and issubclass(each, Row)]
        kind = found[0] if found else kind
    return list(kind.model_fields)


def _first_mistake(error: ValidationError, kind: type[Row]) -> str:
    order = {"extra_forbidden": 0, "missing": 1}
    first = min(error.errors(include_url=False), key=lambda each: order.get(each["type"], 2))
    field = ".".join(str(part) for part in first["loc"])
    if first["type"] == "extra_forbidden":
        known = _fields_at(first["loc"][:-1], kind)
        close = difflib.get_close_matches(str(first["loc"][-1]), known, n=1)
        return f"{field}: no such field; {f'did you mean {close[0]}?' if close else 'there are ' + ', '.join(known)}"
    if first["type"] == "missing":
        return f"{field}: missing; write it"
    if first["type"] == "value_error":
        return f"{field + ': ' if field else ''}{first['ctx']['error']}"
    if first["type"] == "literal_error":
        return f"{field} = {shown(first['input'])}: must be {first['ctx']['expected'].replace(chr(39), '')}"
    rule = (RULES | DATES).get(first["type"], first["msg"]).format(**first.get("ctx", {}))
    return f"{field} = {shown(first['input'])}: {rule}"
