"""What a stage keeps of unfinished work, so that a killed one continues and ends with the same bytes.

    with Interruption("evaluate") as interruption, ResumeState(root, "evaluate", resume_key("evaluate", read)) as state:
        content = state.load("scores")             # None if it is missing or damaged (one line says so)
        state.save("scores", content)              # written whole or not at all, with its checksum
        interruption.check("scoring")              # ends the stage here after SIGTERM or Ctrl-C

The state is in .runs/resume, because DVC deletes the outs of a stage before it runs the stage again. Its name has the
hash of all that the stage reads: with other settings, code or inputs nothing is resumed. A run by hand removes its
state when it succeeds. Under DVC the state is removed only when dvc.lock records the outs: if DVC could not save them,
the same command finds the finished work. The state of an abandoned run may be deleted at any time.
"""

import contextlib
import fcntl
import hashlib
import json
import os
import platform
import shutil
import signal
import sys
import time
from collections.abc import Iterator
from importlib import metadata
from pathlib import Path

import yaml

from stages.files.artifacts import ROOT, Refusal, sha256_of, write_atomically

LIBRARIES = ("torch", "lightning", "numpy", "tokenizers")  # their versions can change bytes
SHA256_BYTES = 32
LOCK_SECONDS = 30  # processes of a stage that was killed need a moment to end
STATES = Path(".runs/resume")
FINISHED = "finished"  # marks work that succeeded and whose outs DVC has not saved yet


@contextlib.contextmanager
def only_holder(path: Path, name: str, refusal: str) -> Iterator[None]:
    """Holds the lock of this file, after waiting LOCK_SECONDS at most; the kernel frees it however a process ends.

    Not filelock, which opens the file again while it waits and fails if the holder has removed the folder by then.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path, "a") as lock:
        deadline, waiting = time.monotonic() + LOCK_SECONDS, False
        while True:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                if time.monotonic() > deadline:
                    raise Refusal(refusal) from None
                if not waiting:
                    waiting = True
                    text = f"offramp: {name}: another process is still running; waiting up to {LOCK_SECONDS} s for it"
                    print(text, file=sys.stderr, flush=True)
                time.sleep(0.2)
        yield


def resume_key(stage: str, read: list, inputs: tuple | list = ()) -> str:
    """Hash of all that a stage reads: plain values such as its settings, its input files, the code and libraries.

    The code is all of stages/: an unrelated edit costs a restart, but a forgotten module would cost the result.
    """
    return _key([stage, read, _versions()], _files_read(inputs))


def resume_and_run_key(stage: str, read: list, anywhere: list, inputs: tuple | list) -> tuple[str, str]:
    """`resume_key`, and the key of the same run on any machine: of `anywhere`, what it reads there, too."""
    files = _files_read(inputs)
    return _key([stage, read, _versions()], files), _key([stage, anywhere], files)


def _versions() -> list[str]:
    return [platform.python_version(), *map(metadata.version, LIBRARIES)]


def _key(plain: list, files: str) -> str:
    return hashlib.sha256(json.dumps([plain, files], sort_keys=True).encode()).hexdigest()[:16]


def _files_read(inputs: tuple | list) -> str:
    digest = hashlib.sha256()
    code = {path.relative_to(ROOT).as_posix(): path for path in sorted((ROOT / "stages").rglob("*.py"))}
    for name, path in [*code.items(), *((path.name, path) for path in inputs)]:
        digest.update(f"{name}\0{sha256_of(path)}\n".encode())
    return digest.hexdigest()


class ResumeState:
    """The folder of one unfinished piece of work; a lock keeps other processes out."""

    def __init__(self, root: Path, stage: str, key: str):
        self.stage, self.folder = stage, root / STATES / f"{stage}-{key}"

    def __enter__(self):
        refusal = (
            f"{self.stage}: the same work, on the same settings and inputs, is already being done by another process:"
            " wait for its end, then run it again"
        )
        self._holding = only_holder(self.folder / "lock", self.stage, refusal)
        self._holding.__enter__()
        return self

    def __exit__(self, error, *_):
        if error is None and "DVC_STAGE" in os.environ:
            write_atomically(self.folder / FINISHED, "")
        elif error is None:
            shutil.rmtree(self.folder, ignore_errors=True)  # the outs are the state now
        self._holding.__exit__(None, None, None)

    def save(self, name: str, content: bytes) -> None:
        write_atomically(self.folder / name, hashlib.sha256(content).digest() + content)

    def load(self, name: str) -> bytes | None:
        """What was saved; None if it is missing or damaged, so that the work is done again."""
        try:
            saved = (self.folder / name).read_bytes()
        except FileNotFoundError:
            return None
        content = saved[SHA256_BYTES:]
        if hashlib.sha256(content).digest() == saved[:SHA256_BYTES]:
            return content
        self.say_damaged(name)
        return None

    def say_damaged(self, name: str) -> None:
        print(f"{self.stage}: {self.folder / name} is damaged: its work is done again", file=sys.stderr, flush=True)


def remove_recorded(root: Path) -> None:
    """Removes the state of finished work whose outs DVC has saved."""
    for finished in sorted((root / STATES).glob(f"*/{FINISHED}")):
        with open(finished.with_name("lock"), "a") as lock, contextlib.suppress(BlockingIOError):
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if _is_saved(root, finished):
                shutil.rmtree(finished.parent, ignore_errors=True)


def _is_saved(root: Path, finished: Path) -> bool:
    """Was dvc.lock, which DVC writes when a stage's outs are in its cache, written since, and does it name these outs?

    The record in provenance/ holds the checksums of all outs, so one comparison is enough. The time matters in a new
    clone: its dvc.lock may name the same outs while DVC's cache is empty.
    """
    stage, lock = finished.parent.name.rpartition("-")[0], root / "dvc.lock"
    record = f"provenance/{stage}.json"
    try:
        if lock.stat().st_mtime_ns < finished.stat().st_mtime_ns:
            return False
        outs = yaml.safe_load(lock.read_text(encoding="utf-8"))["stages"][stage]["outs"]
        saved = [out["md5"] for out in outs if out["path"] == record]
        return saved == [hashlib.md5((root / record).read_bytes(), usedforsecurity=False).hexdigest()]
    except (OSError, ValueError, yaml.YAMLError, LookupError, TypeError):
        return False


class Interruption:
    """Notes SIGTERM and Ctrl-C, so that the stage stops at its next check. A second signal ends it at once."""

    def __init__(self, stage: str):
        self.stage, self.requested, self.doing = stage, False, ""

    def __enter__(self):
        self._before = {number: signal.signal(number, self._note) for number in (signal.SIGTERM, signal.SIGINT)}
        return self

    def _note(self, number, _):
        self.requested = True
        signal.signal(number, self._before[number])
        if self.doing:
            self.check(self.doing)

    def __exit__(self, *_):
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def check(self, doing: str) -> None:
        if self.requested:
            raise KeyboardInterrupt(f"{self.stage}: interrupted while {doing}; the same command continues there")

    def at_once(self, doing: str) -> None:
        """From here on a signal ends the stage immediately, because waiting would save no progress."""
        self.doing = doing
        self.check(doing)
