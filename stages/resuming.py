"""What a stage keeps of unfinished work, so that a killed one continues and ends with the same bytes.

    with Interruption("evaluate") as interruption, ResumeState(root, "evaluate", resume_key("evaluate", read)) as state:
        content = state.load("scores")             # None: not there, or damaged, which is said in a line
        state.save("scores", content)              # whole or not at all, under its checksum
        interruption.check("scoring")              # ends the stage here after SIGTERM or Ctrl-C

The state lies in .runs/resume, because DVC deletes the outs of a stage before it runs it again, under the hash of
all that the stage reads: changed settings, code or inputs find nothing to resume from. A stage that ends well
removes it; what a given-up run leaves behind may be deleted at any time.
"""

import fcntl
import hashlib
import json
import platform
import shutil
import signal
import sys
from importlib import metadata
from pathlib import Path

from stages.artifacts import Refusal, sha256_of, write_atomically

LIBRARIES = ("torch", "lightning", "numpy", "tokenizers")  # those whose version can move a byte
SHA256_BYTES = 32


def resume_key(stage: str, read: list, inputs: tuple | list = ()) -> str:
    """Hash of all that a stage reads: plain values such as its settings, its input files, the code and libraries.

    The code is every room: one that this stage does not import costs a restart, a forgotten one the result.
    """
    versions = [platform.python_version(), *map(metadata.version, LIBRARIES)]
    digest = hashlib.sha256(json.dumps([stage, read, versions], sort_keys=True).encode())
    for path in [*sorted(Path(__file__).parent.glob("*.py")), *inputs]:
        digest.update(f"{path.name}\0{sha256_of(path)}\n".encode())
    return digest.hexdigest()[:16]


class ResumeState:
    """The folder of one unfinished piece of work, which no other process enters while this one holds it."""

    def __init__(self, root: Path, stage: str, key: str):
        self.stage, self.folder = stage, root / ".runs" / "resume" / f"{stage}-{key}"

    def __enter__(self):
        self.folder.mkdir(parents=True, exist_ok=True)
        self._lock = open(self.folder / "lock", "a")
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)  # the kernel frees it however the stage ends
        except BlockingIOError:
            self._lock.close()
            raise Refusal(
                f"{self.stage}: the same work, on the same settings and inputs, is already being done by another"
                " process: wait for its end, then repeat"
            ) from None
        return self

    def __exit__(self, error, *_):
        if error is None:
            shutil.rmtree(self.folder, ignore_errors=True)  # finished: the outs are the state now
        self._lock.close()

    def save(self, name: str, content: bytes) -> None:
        write_atomically(self.folder / name, hashlib.sha256(content).digest() + content)

    def load(self, name: str) -> bytes | None:
        """What was saved; damage costs its work again, never the result."""
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
        print(f"{self.stage}: {self.folder / name} is damaged: what it held is done again", file=sys.stderr, flush=True)


class Interruption:
    """SIGTERM and Ctrl-C are noted, and the stage stops where it can save most. A second one ends it at once."""

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
        """From here on nothing would be saved by going on: a signal ends the stage where it meets it."""
        self.doing = doing
        self.check(doing)
