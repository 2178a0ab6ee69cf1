"""The checkpoint of a training fit: written whole or not at all, beside the training, and checked when read.

    checkpoint = Checkpoint(folder, "teacher")
    state = checkpoint.load()            # None: start from the beginning
    checkpoint.save(step, state)         # returns when the state is copied; a thread writes it
    checkpoint.wait()

`teacher.json` names the file of the latest step and its SHA-256; it is replaced only when that file is safely
on disk, so a kill at any moment, or a full disk, leaves the one before. Training waits for a copy in memory,
a quarter of what torch.distributed.checkpoint's async_save makes it wait at 1.2 GB (benchmarks/checkpoint.py);
and that library's folders hold no checksum and an index that is a pickle.

Where a strategy shares the model out, each rank writes its part, `teacher.0of4-120.pt`, and `teacher.json` names all of
them once they are on disk. `load` gives the whole state of either form. To make one file of the parts of a killed run:

    python -m stages.training.checkpoints .runs/resume/pretrain-<key>/teacher.json
"""

import os
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from stages.files.artifacts import Refusal, read_json, sha256_of, write_json
from stages.files.streams import shield_output
from stages.training.sharding import joined


class Checkpoint:
    """The latest saved state of one fit. One process writes; any number read before it does."""

    def __init__(self, folder: Path, name: str):
        self.folder, self.name = folder, name
        self.index = folder / f"{name}.json"
        self.failure = ""  # why the last save came to nothing
        self.written: int | None = None  # the step of the last save that this process has on disk
        self.bytes_read = 0  # of the files that `load` read
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
            if "parts" in saved:
                return joined([self._read(part) for part in saved["parts"]])
            return self._read(saved)
        except Exception as error:  # whatever a damaged file makes its readers raise
            if not quiet:
                reason = str(error).splitlines()[0] if str(error) else type(error).__name__
                _say(f"{self.name}: the checkpoint {self.index} is damaged ({reason}); its work is done again")
            return None

    def _read(self, saved: dict) -> Any:
        path = self.folder / saved["file"]
        if path.parent != self.folder or sha256_of(path) != saved["sha256"]:
            raise ValueError("SHA-256 differs")
        self.bytes_read += path.stat().st_size
        return torch.load(path, map_location="cpu", weights_only=True)  # data only: a pickle cannot run code

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

    def make_whole(self, step: int) -> bool:
        """Makes one file of the parts that the index names; False where one of them is damaged."""
        state = self.load()
        if state is not None:
            self.save(step, state)
            self.wait()
        return state is not None

    def _write(self, step: int, state: Any) -> None:
        path = self.folder / f"{self.name}-{step}.pt"
        try:
            with path.open("wb") as file:
                torch.save(state, file)
                file.flush()
                os.fsync(file.fileno())
            self._name_in_index(step, path)
        except (OSError, RuntimeError, Refusal) as error:  # RuntimeError: a full disk, as torch's zip writer tells it
            path.unlink(missing_ok=True)
            self.failure = f"the checkpoint of step {step} could not be written ({str(error).splitlines()[0]})"
            kept = f"the one before is kept in {self.folder}" if self.index.exists() else "none was written before"
            _say(f"{self.name}: {self.failure}; {kept}")
            return
        self.failure, self.written = "", step

    def _name_in_index(self, step: int, path: Path) -> None:
        write_json(self.index, {"file": path.name, "sha256": sha256_of(path), "step": step})
        for old in [*self.folder.glob(f"{self.name}-*.pt"), *self.folder.glob(f"{self.name}.*of*")]:
            if old != path:
                old.unlink()


class Part(Checkpoint):
    """What one rank writes of a checkpoint that the ranks share out.

    It keeps the part that the whole's index names, too: until all parts of a newer save are on disk, that is the
    checkpoint.
    """

    def __init__(self, whole: Checkpoint, rank: int, ranks: int):
        super().__init__(whole.folder, f"{whole.name}.{rank}of{ranks}")
        self.whole, self.ranks = whole, ranks

    def _name_in_index(self, step: int, path: Path) -> None:
        write_json(self.index, {"file": path.name, "sha256": sha256_of(path), "step": step})
        kept = self.whole.index.read_text(errors="replace") if self.whole.index.exists() else ""
        for old in self.folder.glob(f"{self.name}-*.pt"):
            if old != path and old.name not in kept:
                old.unlink()

    def name_all(self, step: int) -> None:
        """By rank zero, when every rank has written its part of this step: from here on they are the checkpoint."""
        names = [f"{self.whole.name}.{rank}of{self.ranks}" for rank in range(self.ranks)]
        try:
            parts = [read_json(self.folder / f"{name}.json") for name in names]
            if any(part["step"] != step for part in parts):
                raise Refusal("the ranks have written parts of several steps")
            write_json(self.whole.index, {"parts": parts, "step": step})
        except (OSError, Refusal) as error:
            failure = f"the checkpoint of step {step} could not be written ({error}); the one before is kept"
            _say(f"{self.whole.name}: {failure}")
            return
        for old in [*self.folder.glob(f"{self.whole.name}-*.pt"), *self.folder.glob(f"{self.whole.name}.*of*")]:
            if not old.name.startswith(tuple(f"{name}{end}" for name in names for end in "-.")):
                old.unlink()  # a whole one, or parts for another number of ranks


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


def join_parts(index: Path) -> str:
    """Makes one file of a checkpoint in parts; a line on what is there now. A Refusal where nobody could read it."""
    from stages.files.resuming import only_holder  # late: benchmarks read checkpoints where its packages are missing

    if index.suffix != ".json" or not isinstance(saved := read_json(index), dict) or "step" not in saved:
        raise Refusal(f"{index} is not the index of a checkpoint: name <state>/<model>.json")
    checkpoint = Checkpoint(index.parent, index.stem)
    if "parts" in saved:
        busy = f"{index.parent} is in use: end the run that trains there, then run this again"
        with only_holder(index.parent / "lock", "checkpoints", busy):
            if not checkpoint.make_whole(saved["step"]):
                raise Refusal(f"{index}: not converted; a run goes on without it, from the beginning of this model")
            if checkpoint.failure:
                raise Refusal(f"{index}: {checkpoint.failure}")
        saved = read_json(index)
    size = (index.parent / saved["file"]).stat().st_size
    return f"{index.parent / saved['file']}: step {saved['step']}, {size:,} bytes"


if __name__ == "__main__":
    shield_output()
    try:
        if len(sys.argv) != 2:
            raise Refusal("python -m stages.training.checkpoints <state>/<model>.json")
        print(join_parts(Path(sys.argv[1])))
    except Refusal as refusal:
        sys.exit(f"offramp: {refusal}")
