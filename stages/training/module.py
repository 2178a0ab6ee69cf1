"""A `Fit` as Lightning sees it: a module under automatic optimization, and the batches of one rank."""

import math
from collections import deque
from functools import partial
from typing import Any

import lightning
import torch
from torch import Tensor
from torch.optim.lr_scheduler import LambdaLR
from torch.utils.data import IterableDataset

from stages.training.checkpoints import Checkpoint
from stages.training.fit import Fit, validation_nats
from stages.training.moving import is_same_place
from stages.training.optimizers import MuonAdamW, learning_rate_factor, make_optimizer
from stages.training.order import MODULUS, order_of
from stages.training.saves import Saves, SharedSaves
from stages.training.sharding import full, restore_optimizer
from stages.training.strategies import shards

LARGEST_PRIME = 2**64 - 59  # of what torch takes as a seed


class Batches(IterableDataset):
    """The batches of one rank from a step on: no state beyond the step."""

    def __init__(self, fit: Fit, rank, start: int):
        self.fit, self.rank = fit, rank
        self.numbers = range(start * rank.accumulate, fit.steps * rank.accumulate)
        self.orders: deque[int] = deque()  # of the batches handed out, until their step has ended

    def __iter__(self):
        for number in self.numbers:
            windows = self._windows(number)
            first = number * self.fit.batch_sequences + self.rank.rank * len(windows)
            self.orders.append(order_of(first, windows))
            yield self.rank.windows.stacked(windows)

    def batch(self, number: int) -> Tensor:
        return self.rank.windows.stacked(self._windows(number))

    def order_of_step(self) -> int:
        """Of the batches of the step that ends, see stages/training/order.py."""
        return sum(self.orders.popleft() for _ in range(self.rank.accumulate)) % MODULUS

    def _windows(self, number: int) -> list[int]:
        return self.rank.windows.indices(number, self.rank.rank, self.rank.world_size, self.fit.batch_sequences)


class Progress:
    """What is saved of a fit, and what every rank resumes from: step, weights, optimizer, curve, loads, and the places
    where it was trained.

    The sampler, the schedule and the random numbers of a step are functions of the step, and need no saving.
    """

    def __init__(self, checkpoint: Checkpoint, here: dict):
        self.checkpoint = checkpoint
        self.step = 0
        self.curve: list[dict] = []
        self.recent_loads: list[list[list[float]]] = []
        self.order = 0  # in which the windows were read
        self.places: list[dict] = [here | {"from_step": 0, "bytes": 0}]
        self._optimizer: dict | None = None

    def load(self, model, steps: int, quiet: bool) -> None:
        """Into a whole model; the optimizer's state waits for `restore`."""
        state = self.checkpoint.load(quiet)
        if state is None:
            return
        model.load_state_dict(state["model"])
        self._optimizer = state["optimizer"]
        self.step, self.curve, self.recent_loads = state["step"], state["curve"], state["recent_loads"]
        self.order, (here,) = state["order"], self.places
        self.places = state["places"]
        if self.step < steps and not is_same_place(here, self.places[-1]):
            self.places.append(here | {"from_step": self.step, "bytes": self.checkpoint.bytes_read})

    def restore(self, optimizer: torch.optim.Optimizer) -> None:
        if self._optimizer is not None:
            restore_optimizer(optimizer, self._optimizer)
            self._optimizer = None

    def state(self, model: dict, optimizer: dict) -> dict:
        """With the states of model and optimizer."""
        state: dict[str, Any] = {"model": model, "optimizer": optimizer}
        state |= {"step": self.step, "curve": self.curve, "recent_loads": self.recent_loads}
        return state | {"order": self.order, "places": self.places}

    def save(self, state: dict) -> None:
        self.checkpoint.save(self.step, state)


class Training(lightning.LightningModule):
    optimizer: MuonAdamW  # once `configure_model` has run

    def __init__(self, fit: Fit, rank, progress: Progress, batches: Batches):
        super().__init__()
        self.model, self.fit, self.rank, self.progress = fit.model, fit, rank, progress
        self.batches = batches
        self.saves = (SharedSaves if shards(rank.strategy) else Saves)(progress, rank)
        self.teacher = getattr(fit.objective, "teacher", None)  # a submodule, so that Lightning moves it to the device
        self.outcomes: list[tuple[dict[str, Tensor], list[Tensor]]] = []  # of the batches of this step
        self.final: dict | None = None  # on rank zero the whole state after the last step

    def configure_model(self) -> None:
        """Shares the model out where the strategy does; the optimizer is made of what is there then."""
        if shards(self.rank.strategy):
            self.rank.strategy.shard_model(self)
        self.optimizer = make_optimizer(self.model, self.rank.optimizer, self.fit.learning_rate_scale)
        self.progress.restore(self.optimizer)

    def configure_optimizers(self):
        recipe, steps = self.rank.optimizer, self.fit.steps

        def factor(step):
            return learning_rate_factor(step, steps, recipe.warmup_share, recipe.decay_share)

        taken_over = getattr(self.rank.strategy, "for_engine", None)
        optimizer = taken_over(self.optimizer) if taken_over else self.optimizer
        schedule = LambdaLR(optimizer, factor, last_epoch=self.progress.step - 1)  # it starts with a step
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}

    def training_step(self, tokens_BT1: Tensor, _) -> Tensor:
        rank = self.rank
        number = self.progress.step * rank.accumulate + len(self.outcomes)
        drawn = (rank.settings.seed << 40) + (number << 16) + rank.rank  # random operations repeat after a resume
        torch.manual_seed(drawn % LARGEST_PRIME)
        outcome = self.fit.objective(self.model, tokens_BT1)
        self.outcomes.append(({"loss": outcome.loss.detach()} | outcome.parts, outcome.loads))
        return outcome.loss

    def backward(self, loss: Tensor) -> None:
        with self.trainer.precision_plugin.forward_context():  # for gradients written by hand
            loss.backward()

    def configure_gradient_clipping(self, optimizer, gradient_clip_val=None, gradient_clip_algorithm=None) -> None:
        # the norm is summed in the model's order of parameters; the optimizer's groups have another
        limit = math.inf if gradient_clip_val is None else gradient_clip_val
        self.gradient_norm = full(torch.nn.utils.clip_grad_norm_(self.model.parameters(), limit))

    def optimizer_step(self, epoch, batch_index, optimizer, optimizer_closure=None) -> None:
        with self.trainer.precision_plugin.forward_context():  # Muon works in the dtype of autocast
            optimizer.step(closure=optimizer_closure)

    def validate(self) -> float:
        """Bits per byte of the validation split; a collective."""
        in_engine = getattr(self.rank.strategy, "validation_nats", None)
        return self.rank.validate(self.model, self.fit, partial(in_engine, self) if in_engine else None)

    def validation_nats(self, batches: list[Tensor]) -> Tensor:
        return validation_nats(self.model, batches)

    def rehearse(self) -> None:
        """A pass whose gradients are thrown away, for a strategy whose first pass sums in another order."""
        strategy = self.trainer.strategy
        tokens_BT1 = self.batches.batch(self.batches.numbers[0]).to(self.device)
        with self.trainer.precision_plugin.forward_context():
            strategy.backward(strategy.training_step(tokens_BT1, 0), self.optimizer)
        self.outcomes.clear()
        self.optimizer.zero_grad(set_to_none=True)
