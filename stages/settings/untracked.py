"""What is no reason to run a stage again: who watches a run, how long it may take, and where its ranks run. How many
there are, and on what, is a condition of the outs all the same, and stands in their record.

The stage `config` writes it into a section of its own in resolved.yaml, `untracked`, which dvc.yaml does not name. Nor
is it in the key of unfinished work: a run that `trainer.max_time` stopped goes on under another limit. A run that has
moved (`trainer.move`) says so in its record, for its outs are those of all the places that it was trained in.
"""

import copy
from collections.abc import Iterable
from typing import Any

SECTION = "untracked"
OBSERVERS = ("callbacks", "logger")
OF_TRAINING = (*OBSERVERS, "engine")
UNTRACKED = (*OF_TRAINING, "trainer.fast_dev_run", "trainer.max_time", "trainer.move")


def with_observers(sections: Iterable[str]) -> tuple[str, ...]:
    """The sections that a stage reads: one that trains is watched, and runs somewhere, too."""
    sections = tuple(sections)
    return sections + OF_TRAINING if "trainer" in sections else sections


def divided(plain: dict[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """The settings that outs depend on, and the others under the same names."""
    tracked, untracked = copy.deepcopy(plain), {}
    for key in UNTRACKED:
        section, _, name = key.partition(".")
        if section in tracked and not name:
            untracked[section] = tracked.pop(section)
        elif section in tracked and name in tracked[section]:
            untracked.setdefault(section, {})[name] = tracked[section].pop(name)
    return tracked, untracked


def joined(resolved: dict[str, Any]) -> dict[str, Any]:
    """The inverse, of what resolved.yaml holds."""
    plain = {name: value for name, value in resolved.items() if name != SECTION}
    untracked = resolved.get(SECTION)
    for section, values in (untracked if isinstance(untracked, dict) else {}).items():
        both = isinstance(values, dict) and isinstance(plain.get(section), dict)
        plain[section] = plain[section] | values if both else values
    return plain
