"""A mistake in the settings as one line that names key, value and rule: pydantic finds it, this words it."""

import difflib
import re
from collections.abc import Collection, Iterable, Mapping, Sequence
from typing import Any, NoReturn

from pydantic import BaseModel, ValidationError
from pydantic.fields import FieldInfo

from stages.files.artifacts import Refusal

UNKNOWN = ("extra_forbidden", "invalid_key")
RANK = {"extra_forbidden": 0, "invalid_key": 0, "missing": 1}  # a wrong name explains what is missing
RULES = {  # by pydantic's type of error
    "model_type": "must be a mapping of settings",
    "bool_type": "must be true or false",
    "int_type": "must be a whole number",
    "float_type": "must be a number",
    "too_short": "must name at least one",
    "tuple_type": "must be a list, such as [a, b]",
    "string_type": "must be a word",
    "string_unicode": "must be a word",
    "string_pattern_mismatch": "must be a word",
    "finite_number": "must be a finite number",
    "greater_than": "must be above {gt:,.15g}",
    "greater_than_equal": "must be at least {ge:,.15g}",
    "less_than_equal": "must be at most {le:,.15g}",
}
RENAMED = {"optimizer.clip_norm": "trainer.gradient_clip_val"}
TEXT_IS_WRONG = ("bool_type", "int_type", "float_type", "tuple_type")


def picked(plain: Mapping[str, Any], names: Iterable[str]) -> dict[str, Any]:
    """Of settings those of these names: whole sections, or "teacher.path" from its section. Who is missing stays so."""
    found: dict[str, Any] = {}
    for name in names:
        section, _, setting = name.partition(".")
        if section in plain and (not setting or not isinstance(plain[section], dict)):
            found[section] = plain[section]
        elif section in plain and setting in plain[section]:
            found.setdefault(section, {})[setting] = plain[section][setting]
    return found


def refuse_first(error: ValidationError, model: type[BaseModel]) -> NoReturn:
    """The first mistake that pydantic found, as a Refusal: an unknown name, else a missing one, else a value."""
    errors = error.errors(include_url=False)
    first = min(errors, key=lambda each: RANK.get(each["type"], len(RANK)))
    path, known = _setting_at(first["loc"], model)
    key, value = ".".join(path), first["input"]
    if first["type"] in UNKNOWN:
        refuse_unknown(first["loc"][-1], known, path)
    if first["type"] == "missing":
        raise Refusal(f"{key}: missing; put it in params.yaml or in a preset of conf/")
    of_setting = [each for each in errors if _setting_at(each["loc"], model)[0] == path]
    of_setting = [each for each in of_setting if each is first or each["type"] != "too_short"]  # of one wrong word
    words = [each["ctx"]["expected"].replace("'", "") for each in of_setting if each["type"] == "literal_error"]
    is_number = isinstance(value, (int, float)) and not isinstance(value, bool)
    if words and len(of_setting) > 1 and not is_number:
        _refuse_type(key, value, f"must be {words[0]} or a number")
    if words and len(of_setting) == 1:
        refuse(key, value, f"must be {words[0]}")
    rule = RULES[first["type"]].format(**first.get("ctx", {})) if first["type"] in RULES else first["msg"]
    if first["type"] in TEXT_IS_WRONG:
        _refuse_type(key, value, rule)
    refuse(key, value, rule)


def _setting_at(place: Sequence[int | str], model: type[BaseModel]) -> tuple[tuple[str, ...], dict[str, FieldInfo]]:
    """The path of settings in pydantic's place of an error, which may go on into a list or a union; what may follow."""
    path: tuple[str, ...] = ()
    known: dict[str, FieldInfo] = dict(model.model_fields)
    for name in place:
        if not isinstance(name, str) or name not in known:
            break
        path, inner = (*path, name), known[name].annotation
        known = getattr(inner, "model_fields", {})
    return path, known


def refuse_unknown(name: Any, known: Collection[str], path: tuple[str, ...] = ()) -> None:
    if isinstance(name, str) and name in known:
        return
    key = ".".join((*path, name if isinstance(name, str) and re.fullmatch(r"[\w-]+", name) else shown(name)))
    close = difflib.get_close_matches(str(name), known, n=1) if isinstance(name, str) else []
    from stages.settings.schema import leaves  # late: it imports this module

    elsewhere = [leaf for leaf in leaves() if isinstance(name, str) and leaf.endswith(f".{name}")]
    if key in RENAMED:
        hint = f"it is {RENAMED[key]} now"
    elif close:
        hint = f"did you mean {'.'.join((*path, close[0]))}?"
    elif elsewhere:
        hint = f"did you mean {elsewhere[0]}?"
    else:
        hint = f"there are {', '.join(sorted(known))}"
    raise Refusal(f"{key}: no such setting; {hint}")


def refuse(key: str, value: Any, rule: str) -> NoReturn:
    raise Refusal(f"{key} = {shown(value)}: {rule}")


def _refuse_type(key: str, value: Any, rule: str) -> NoReturn:
    """Text where something else is needed stands in quotes; what would be right without them comes with a way there."""
    if not isinstance(value, str):
        refuse(key, value, rule)
    hint = ""
    if re.fullmatch(r"true|false|[-+]?[\d.]+(e[-+]?\d+)?", value.strip(), re.ASCII | re.IGNORECASE):
        hint = ", and this is text: write it without quotes"
    raise Refusal(f"{key} = {_cut(repr(value))}: {rule}{hint}")


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
