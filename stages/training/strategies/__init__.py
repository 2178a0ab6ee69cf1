"""How the ranks share the work of a step: `trainer.strategy` names a module of this folder.

A strategy is two functions in `stages/training/strategies/<word>.py`:

    lightning_strategy() -> lightning.pytorch.strategies.Strategy
    needs_rehearsal(world_size) -> bool     # does the first pass of a process add up in another order than later ones?

a third where a rank keeps a part of the model only:

    shard_model(training) -> None           # shares the weights of `training.model` out, as stages/training/sharding.py

and another where ranks differ after some steps:

    ranks_agree(step, steps, trainer) -> bool   # are all equal after this one of so many? else nothing is saved there

To add one, add that file: its name is the word. A strategy with neither of the two holds the whole model and equal
gradients on every rank.
"""

from importlib import import_module
from types import ModuleType


def strategy(word: str) -> ModuleType:
    """The strategy of this name; the settings have checked that it is there."""
    return import_module(f"stages.training.strategies.{word}")


def ranks_agree(chosen: ModuleType, step: int, steps: int, trainer) -> bool:
    """Are all ranks equal after this step, of so many? Always, where the strategy does not say otherwise."""
    return not hasattr(chosen, "ranks_agree") or chosen.ranks_agree(step, steps, trainer)


def shards(chosen: ModuleType) -> bool:
    """Does a rank keep a part of the model only?"""
    return hasattr(chosen, "shard_model")
