"""What a person sees of a fit while it trains.

On a terminal a line that is written anew, in a log a line now and then, the first within seconds:

    teacher: step 10/400  loss 6.2511  5,120 tokens/s  5 min 20 s left
    teacher: step 50/400  loss 4.8120  validation 2.9310 bits/byte  5,230 tokens/s  4 min 33 s left
"""

import contextlib
import os
import shutil
import time
from collections.abc import Callable
from typing import TextIO

FIRST_S = 5.0  # the first line comes by then, where a step has ended
LOG_S = 30.0  # between two lines of a log without a validation
TERMINAL_S = 0.5  # between two states of a terminal's line
ERASE = "\x1b[2K"


class ProgressLine:
    """The lines of one fit; without `out` it says nothing."""

    def __init__(self, name: str, start: int, steps: int, first: int, tokens_per_step: int, out: TextIO | None,
                 clock: Callable[[], float] = time.monotonic):
        self.name, self.start, self.steps, self.first = name, start, steps, start + first
        self.tokens_per_step, self.out, self.clock = tokens_per_step, out, clock
        self.live = out is not None and out.isatty() and os.environ.get("TERM", "dumb") != "dumb"
        self.began = self.said = clock()
        self.due = self.began + FIRST_S
        self.paced_from, self.paced_at = start, self.began  # where speed is counted from

    def step(self, step: int, loss: float, validation: float | None = None) -> None:
        """Called after every step; writes when it is time to."""
        now = self.clock()
        line = f"{self.name}: step {step}/{self.steps}  loss {loss:.4f}"
        if validation is not None:
            line += f"  validation {validation:.4f} bits/byte"
        seconds = (now - self.paced_at) / (step - self.paced_from)
        line += f"  {self.tokens_per_step / max(seconds, 1e-9):,.0f} tokens/s"
        if step < self.steps:
            line += f"  {_duration(seconds * (self.steps - step))} left"
        if step == self.start + 1:  # the first takes longer: what follows is counted without it
            self.paced_from, self.paced_at = step, now
        if validation is not None or not self.live and (now >= self.due or step >= self.first):
            self._write(line + "\n")
            self.due, self.first = now + LOG_S, self.steps
        elif self.live and now - self.said >= TERMINAL_S:
            self._write(line[: shutil.get_terminal_size().columns - 1] + "\r")  # what others say goes over it
            self.said = now

    def close(self) -> None:
        """Leaves a clean line to who writes next."""
        self._write("")

    def _write(self, text: str) -> None:
        if self.out is not None:
            with contextlib.suppress(OSError, ValueError):  # nobody reads any more: no reason to stop training
                self.out.write((ERASE if self.live else "") + text)
                self.out.flush()


def _duration(seconds: float) -> str:
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    if hours:
        return f"{hours} h {minutes} min"
    return f"{minutes} min {seconds} s" if minutes else f"{seconds} s"
