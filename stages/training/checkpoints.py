"""The checkpoint of a training fit: written whole or not at all, beside the training, and checked when read.

    checkpoint = Checkpoint(folder, "teacher")
    state = checkpoint.load()            # None: start from the beginning
    checkpoint.save(step, state)         # returns when the state is copied; a thread writes it
    checkpoint.wait()

`teacher.json` names the file of the latest step and its SHA-256; it is replaced only when that file is safely
on disk, so a kill at any moment, or a full disk, leaves the one before. Training waits for a copy in memory,
a quarter of what torch.distributed.checkpoint's async_save makes it wait at 1.2 GB (benchmarks/checkpoint.py);
and that library's folders hold no checksum and an index that is a pickle.
"""

import os
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from stages.files.artifacts import Refusal, read_json, sha256_of, write_json


class Checkpoint:
    """The latest saved state of one fit. One process writes; any number read before it does."""

    def __init__(self, folder: Path, name: str):
        self.folder, self.name = folder, name
        self.index = folder / f"{name}.json"
        self.failure = ""  # why the last save came to nothing
        self._copy: Any = None
        self._thread: threading.Thread | None = None

    def load(self, quiet: bool = False) -> Any:
        """The saved state, on CPU; None where there is none, or none that is as it was written.

        Training is deterministic, so starting again costs time; going on from damage would cost the result.
        """
        if not self.index.exists():
            return None
        try:
            saved = read_json(self.index)
            path = self.folder / saved["file"]
            if path.parent != self.folder or sha256_of(path) != saved["sha256"]:
                raise ValueError("SHA-256 differs")
            return torch.load(path, map_location="cpu", weights_only=True)  # data only: a pickle cannot run code
        except Exception as error:  # whatever a damaged file makes its readers raise
            if not quiet:
                reason = str(error).splitlines()[0] if str(error) else type(error).__name__
                _say(f"{self.name}: the checkpoint {self.index} is damaged ({reason}); its work is done again")
            return None

    @property
    def busy(self) -> bool:
        return self._thread is not None and self._thread.is_alive()

    def save(self, step: int, state: Any) -> None:
        """Copies the state, any nesting of dicts and lists of tensors, and writes it in the background."""
        self.wait()
        self._copy = _copied(state, self._copy)
        self._thread = threading.Thread(target=self._write, args=(step, self._copy))
        self._thread.start()

    def wait(self) -> None:
        if self._thread is not None:
            self._thread.join()

    def _write(self, step: int, state: Any) -> None:
        path = self.folder / f"{self.name}-{step}.pt"
        try:
            with path.open("wb") as file:
                torch.save(state, file)
                file.flush()
                os.fsync(file.fileno())
            write_json(self.index, {"file": path.name, "sha256": sha256_of(path), "step": step})
        except (OSError, RuntimeError, Refusal) as error:  # RuntimeError: a full disk, as torch's zip writer tells it
            path.unlink(missing_ok=True)
            self.failure = f"the checkpoint of step {step} could not be written ({str(error).splitlines()[0]})"
            kept = f"the one before is kept in {self.folder}" if self.index.exists() else "none was written before"
            _say(f"{self.name}: {self.failure}; {kept}")
            return
        self.failure = ""
        for old in self.folder.glob(f"{self.name}-*.pt"):
            if old != path:
                old.unlink()


def made_once(folder: Path, rank: int, name: str, make: Callable[[], Any]) -> Any:
    """What `make` gives, kept for the process that resumes. It must depend on nothing but the stage's inputs:
    a rank that does not find it yet makes the same."""
    checkpoint = Checkpoint(folder, name)
    state = checkpoint.load(quiet=rank != 0)
    if state is None:
        state = make()
        if rank == 0:
            checkpoint.save(0, state)
            checkpoint.wait()
    return state


def _copied(value: Any, before: Any = None) -> Any:
    """A copy on CPU, in the memory of the copy before where that fits: fresh pages cost more than the copying."""
    if isinstance(value, Tensor):
        fits = isinstance(before, Tensor) and before.shape == value.shape and before.dtype == value.dtype
        return before.copy_(value.detach()) if fits else value.detach().to("cpu", copy=True)
    if isinstance(value, dict):
        before = before if isinstance(before, dict) else {}
        return {key: _copied(inner, before.get(key)) for key, inner in value.items()}
    if isinstance(value, (list, tuple)):
        before = before if isinstance(before, list) and len(before) == len(value) else [None] * len(value)
        return [_copied(*pair) for pair in zip(value, before, strict=True)]
    return value


def _say(message: str) -> None:
    print(f"offramp: {message}", flush=True)  # a rank's stderr goes to its log
