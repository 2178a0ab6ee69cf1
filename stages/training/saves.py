"""When the state of a fit is saved: each `trainer.checkpoint_every_seconds` beside the training, at a stop, at its end.

At a stop and at the end it is one file, which a run under any strategy and number of ranks reads.
"""

import os
import time
from typing import Any

from stages.training.checkpoints import Part
from stages.training.sharding import part, whole
from stages.training.strategies import has_engine


class Saves:
    """Where every rank holds the whole model: rank zero copies it, and a thread writes the copy."""

    def __init__(self, progress, rank):
        self.progress, self.rank = progress, rank

    def start(self) -> None:
        self.saved = time.monotonic()

    def wishes(self) -> list[float]:
        """What this rank adds to the sum that the ranks agree on after a step."""
        return []

    def after_step(self, module, wishes: list[float]) -> None:
        if self._is_due() and not self.progress.checkpoint.busy:
            self.progress.save(self._state(module))
            self.saved = time.monotonic()

    def save_whole(self, module) -> dict | None:
        """Saves the state in one file, and returns it on rank zero; a collective."""
        if self.rank.rank != 0:
            return None
        state = self._state(module)
        self.progress.save(state)
        return state

    def _state(self, module) -> dict:
        return self.progress.state(module.model.state_dict(), module.optimizer.state_dict())

    def _is_due(self) -> bool:
        return self.rank.rank == 0 and time.monotonic() - self.saved > self.rank.checkpoint_every_seconds


class SharedSaves(Saves):
    """Where a rank holds a part of the model: each writes its part, at a step that they agree on.

    Ranks of several machines may see several folders: there the parts are gathered, and rank zero writes the whole. So
    it is where an engine has taken the model over.
    """

    def __init__(self, progress, rank):
        super().__init__(progress, rank)
        self.part = Part(progress.checkpoint, rank.rank, rank.world_size)
        is_one_machine = int(os.environ.get("LOCAL_WORLD_SIZE", rank.world_size)) == rank.world_size
        self.in_parts = is_one_machine and not has_engine(rank.strategy)
        self.asked: int | None = None  # the step whose parts are being written

    def wishes(self) -> list[float]:
        is_written = self.asked is not None and self.part.written == self.asked
        is_busy = self.part.busy or self.progress.checkpoint.busy
        return [float(self._is_due()), float(is_busy), float(is_written)]

    def after_step(self, module, wishes: list[float]) -> None:
        due, busy, written = wishes
        if busy:
            return
        if written == self.rank.world_size and self.asked is not None:
            if self.rank.rank == 0:
                self.part.name_all(self.asked)
            self.asked = None
        if due and self.in_parts:
            self.asked = self.progress.step
            self.part.save(self.asked, part(self._state(module)))
        elif due:
            self.save_whole(module)
        if due:
            self.saved = time.monotonic()

    def save_whole(self, module) -> dict | None:
        self.part.wait()
        is_first = self.rank.rank == 0
        state: dict[str, Any]
        if has_engine(self.rank.strategy):
            state = self.progress.state(*self.rank.strategy.whole_state(module, keep=is_first))
        else:
            state = whole(self._state(module), keep=is_first)
        if not is_first:
            return None
        self.progress.save(state)
        return state
