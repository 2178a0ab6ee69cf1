"""Where the ranks of a training stage run: `engine=<word>` names a module of this folder and a preset of conf/engine.

An engine is a module `stages/engines/<word>.py`:

    class Options(Section)              the settings under engine.options that only it knows
    render(plan) -> str                 the engine's own document, complete; nothing is read or started
    run(plan, told) -> str              runs the plan to its end, and says why it failed, "" where it did not; `told`
                                        takes the lines that the ranks print. Absent where it cannot run from here
    START                               where `run` is absent: the command that starts the document

`local` and `torchrun` have no `run`: the stage process is their agent (stages/training/launchers/torchrun.py). To add
an engine, add its module and its preset.
"""

from importlib import import_module
from types import ModuleType


def engine(word: str) -> ModuleType:
    """The engine of this name; the settings have checked that it is there."""
    return import_module(f"stages.engines.{word}")
