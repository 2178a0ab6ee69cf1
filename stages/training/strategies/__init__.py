"""How the ranks share the work of a step: `trainer.strategy` names a module of this folder.

A strategy is two functions in `stages/training/strategies/<word>.py`:

    lightning_strategy() -> lightning.pytorch.strategies.Strategy
    needs_rehearsal(world_size) -> bool     # does the first pass of a process add up in another order than later ones?

a third where a rank keeps a part of the model only:

    shard_model(training) -> None           # shares the weights of `training.model` out, as stages/training/sharding.py

and another where ranks differ after some steps:

    ranks_agree(step, steps, trainer) -> bool   # are all equal after this one of so many? else nothing is saved there

and four where an engine takes model and optimizer over (stages/training/zero.py):

    shard_model                                         # as above
    for_engine(optimizer) -> torch.optim.Optimizer      # what it takes over; `training.optimizer` stays as it is
    validation_nats(training, batches) -> Tensor        # as stages/training/fit.py has it, in the engine's forward pass
    whole_state(training, keep) -> tuple[dict, dict]    # the states of model and optimizer; tensors only where `keep`

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


def has_engine(chosen: ModuleType) -> bool:
    """Does something else than Lightning hold the weights and make the steps?"""
    return hasattr(chosen, "whole_state")


def shards(chosen: ModuleType) -> bool:
    """Does a rank keep a part of the model only?"""
    return hasattr(chosen, "shard_model")
