"""The text of a row: a field by name, by a dotted path such as meta.text, or a chat.

A chat is a list of messages {"role": …, "content": …} (or {"from": …, "value": …}). It becomes one text: each message
as `role: content`, a blank line between two. Of a content that is a list of parts, those with a text are joined by line
ends; a message without any text, such as a call of a tool, is passed over.
"""

from collections.abc import Iterable, Iterator
from typing import Any

from stages.files.artifacts import Refusal

WITHOUT_FIELD = False  # in place of a text; JSON keeps it apart from null
NAMES_IN_A_MESSAGE = 12
ROWS_TO_NAME_FIELDS = 100


def field_texts(
    rows: Iterable[tuple[str, Any]], field: str, source: str, patience: int | None = None, found: bool = False
) -> Iterator[tuple[str, str | bool | None]]:
    """(where, text) of every row: None for a null, WITHOUT_FIELD where the row has no such field.

    Refused when no row of the source has it, or none of the first `patience` rows.
    """
    count = 0
    fields: dict[str, None] = {}  # for their order
    texts: dict[str, None] = {}
    for count, (where, row) in enumerate(rows, start=1):
        if not isinstance(row, dict):
            raise Refusal(f'{where} is not an object: it must look like {{"{field}": "…"}}')
        try:
            value = value_at(row, field)
        except KeyError:
            if not found and count <= ROWS_TO_NAME_FIELDS:
                fields |= dict.fromkeys(row)
                texts |= dict.fromkeys(text_paths(row))
            yield where, WITHOUT_FIELD
            if count == patience and not found:
                break
            continue
        found = True
        yield where, text_of(value, field, row, where)
    if count and not found:
        raise Refusal(f"{source}: no row has the field {field!r}: {cure(texts, fields)}")


def value_at(row: dict, path: str) -> Any:
    """The value of a field: of that name, or down the dotted path; a null on the way is the value."""
    if path in row:
        return row[path]
    value: Any = row
    for name in path.split("."):
        if value is None:
            return None
        if not isinstance(value, dict) or name not in value:
            raise KeyError(name)
        value = value[name]
    return value


def text_of(value: Any, field: str, row: dict, where: str) -> str | None:
    """The value as text. A null is an empty document; what is neither text nor a chat is a mistake."""
    if value is None or isinstance(value, str):
        return value
    if is_chat(value):
        return chat_text(value)
    kind = type(value).__name__
    inside = text_paths(value, f"{field}.") if isinstance(value, dict) else []
    raise Refusal(f"{where}: field {field!r} is of type {kind}, not text: {cure(inside or text_paths(row), row)}")


def is_chat(value: Any) -> bool:
    def message(item: Any) -> bool:
        return isinstance(item, dict) and ({"role", "content"} <= item.keys() or {"from", "value"} <= item.keys())

    return isinstance(value, list) and bool(value) and all(map(message, value))


def chat_text(messages: list[dict]) -> str:
    turns = []
    for message in messages:
        role = message.get("role", message.get("from"))
        content = message.get("content", message.get("value"))
        if isinstance(content, list):
            parts = [part.get("text") if isinstance(part, dict) else part for part in content]
            content = "\n".join(part for part in parts if isinstance(part, str))
        if isinstance(content, str) and content:
            turns.append(f"{role}: {content}")
    return "\n\n".join(turns)


def text_paths(row: dict, prefix: str = "") -> list[str]:
    """The paths under which the row holds a text or a chat."""
    paths = []
    for name, value in row.items():
        if prefix and "." in name:
            continue  # no dotted path leads there
        if isinstance(value, str) or is_chat(value):
            paths.append(f"{prefix}{name}")
        elif isinstance(value, dict) and "." not in name:
            paths += text_paths(value, f"{prefix}{name}.")
    return paths


def cure(texts: Iterable[str], fields: Iterable[str]) -> str:
    """Which setting works; where none does, what the rows have instead."""
    texts, fields = list(texts)[:NAMES_IN_A_MESSAGE], list(map(str, fields))[:NAMES_IN_A_MESSAGE]
    if not texts:
        return f"none of the fields ({', '.join(fields) or 'there are none'}) holds text or a chat: convert the data"
    others = f" (or {', '.join(texts[1:])})" if texts[1:] else ""
    return f"set corpus.text_field={texts[0]}{others}, in params.yaml as corpus: {{text_field: {texts[0]}, …}}"
