"""How the ranks of a training stage are started: `trainer.launcher` names a module of this folder.

A launcher is a class `Launcher` in `stages/training/launchers/<word>.py` with the methods below. To add one, add that
file: its name is the word.
"""

from importlib import import_module
from pathlib import Path
from typing import Protocol


class Launcher(Protocol):
    """A context manager: what it started has ended when the context ends."""

    def __enter__(self) -> "Launcher": ...

    def __exit__(self, *error: object) -> None: ...

    def conditions(self, trainer: dict) -> dict:
        """What the bytes will depend on (see stages/training/machine.py); a Refusal where something is missing."""
        ...

    def run(self, job: Path) -> int:
        """Runs `python -m stages.training.rank <job>` in every rank; the exit code of the whole."""
        ...


def launcher(word: str) -> Launcher:
    """The launcher of this name; the settings have checked that it is there."""
    return import_module(f"stages.training.launchers.{word}").Launcher()
