"""Settings that have Lightning's names and are written as Lightning's users write them; each with its one-line rule.

trainer.max_time            "DD:HH:MM:SS", or null
trainer.limit_val_batches   a number of batches, or a share of them (1.0: all)
trainer.fast_dev_run        false, true (one step), or a number of steps
callbacks, logger           by a name of one's own: a class (`_target_`) and its arguments, for hydra.utils.instantiate
"""

import json
import re
from typing import Annotated, Any

from pydantic import BeforeValidator, Field
from pydantic_core import PydanticCustomError

MOST_STEPS = 65536
DURATION = re.compile(r"(\d{1,6}):(\d{1,2}):(\d{1,2}):(\d{1,2})")  # days, hours, minutes, seconds


def duration_seconds(text: str) -> int:
    """Seconds in "DD:HH:MM:SS", as Lightning reads `max_time`."""
    found = DURATION.fullmatch(text)
    assert found, "the settings have been checked"
    days, hours, minutes, seconds = map(int, found.groups())
    return ((days * 24 + hours) * 60 + minutes) * 60 + seconds


def _duration(value: Any) -> str | None:
    text = isinstance(value, str) and DURATION.fullmatch(value)
    if value is not None and not (text and duration_seconds(value) > 0):
        unquoted = ", in quotes, else YAML reads a number" if isinstance(value, int) else ""
        raise _broken(f'must be a time such as "00:12:30:00" (days:hours:minutes:seconds{unquoted}), or null')
    return value


def _batches(value: Any) -> int | float:
    whole = isinstance(value, int) and not isinstance(value, bool) and 1 <= value <= MOST_STEPS
    if not whole and not (isinstance(value, float) and 0 < value <= 1):
        raise _broken("must be a number of batches from 1 on, or a share of them above 0.0 and up to 1.0")
    return value


def _few_steps(value: Any) -> bool | int:
    if not isinstance(value, int) or not 0 <= value <= MOST_STEPS:
        raise _broken(f"must be false, true, or a number of steps up to {MOST_STEPS:,}")
    return value


def _observers(value: Any) -> dict[str, dict[str, Any]]:
    entries = value.items() if isinstance(value, dict) else [(None, None)]
    for name, entry in entries:
        target = entry.get("_target_") if isinstance(entry, dict) else None
        if not isinstance(name, str) or not isinstance(target, str) or "." not in target:
            raise _broken("must be a mapping of names to a class each: {name: {_target_: package.Class, ...}}")
    try:
        json.dumps(value, allow_nan=False)
    except (ValueError, TypeError, RecursionError):
        raise _broken("must hold plain values: words, finite numbers, lists, mappings") from None
    return value


def _broken(rule: str) -> PydanticCustomError:
    return PydanticCustomError("lightning", "{rule}", {"rule": rule})


Duration = Annotated[str | None, BeforeValidator(_duration)]
Batches = Annotated[
    Annotated[int, Field(ge=1, le=MOST_STEPS)] | Annotated[float, Field(gt=0, le=1)], BeforeValidator(_batches)
]
FewSteps = Annotated[bool | Annotated[int, Field(ge=0, le=MOST_STEPS)], BeforeValidator(_few_steps)]
Observers = Annotated[dict[str, dict[str, Any]], BeforeValidator(_observers)]
