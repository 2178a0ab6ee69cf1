"""The folder `.runs/tracking/` of run records: what each holds, whether its stage still runs, what was sent of it.

    events.jsonl   what the stage recorded, one JSON object per line
    files/         copies of the files and folders that the lines name
    alive          locked by the stage while it runs
    mirror         locked by the process that sends the record, while it runs
    sent.json      what was sent where
"""

import contextlib
import fcntl
import hashlib
import json
import re
import time
from pathlib import Path

RECORDS = Path(".runs/tracking")
ALL_SENT = "everything is sent"
FAILURE = RECORDS / "failure.txt"  # why the last mirror did not send all; absent when it did
SETTLE_S = 120.0  # how long `await_mirrors` waits


def read_lines(path):
    """The whole JSON lines of a file; what a kill or a full disk cut short is passed over."""
    lines = []
    for line in path.read_bytes().split(b"\n")[:-1]:  # the last piece has no line end: empty, or torn
        with contextlib.suppress(ValueError, RecursionError):
            lines.append(json.loads(line))
    return [line for line in lines if isinstance(line, dict) and _names_own_file(line)]


def _names_own_file(event):
    """A record names only what `Run._keep` put into it: the mirror sends such files, and removes them."""
    return "file" not in event or re.fullmatch(r"files/\d+-[^/]+", str(event["file"])) is not None


def is_alive(folder):
    """Is the stage that writes this record still running?"""
    return is_locked(folder / "alive")


def is_locked(path):
    """Does a process hold the lock of this file? The kernel frees it however the process ends."""
    with open(path, "a") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_SH | fcntl.LOCK_NB)  # shared: two that ask at once do not see each other
        except BlockingIOError:
            return True
    return False


@contextlib.contextmanager
def mirroring(folder):
    """Says to `await_mirrors` that this process sends the record."""
    with open(folder / "mirror", "a") as lock:
        with contextlib.suppress(BlockingIOError):  # another one does, too, and is awaited
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        yield


def await_mirrors(store):
    """Returns when the mirrors of stages that have ended have ended, too: nothing then writes here unseen."""
    deadline = time.monotonic() + SETTLE_S
    folders = [path.parent for path in (store / RECORDS).glob("*/mirror")]
    while folders and time.monotonic() < deadline:
        folders = [folder for folder in folders if is_locked(folder / "mirror") and not is_alive(folder)]
        time.sleep(0.1 if folders else 0)


def unsent(store):
    """The records that no store has seen whole, oldest first."""
    folders = sorted(path.parent for path in (store / RECORDS).glob("*/events.jsonl"))
    return [folder for folder in folders if not is_sent(folder)]


def is_sent(folder, uri=None):
    """Has a store, or the store at this URI, the whole record?"""
    states = read_sent(folder)
    return any(state.get("done") for name, state in states.items() if uri is None or name == store_name(uri))


def read_sent(folder):
    """What was sent where: store name -> {run_id, events, done}."""
    try:
        states = json.loads((folder / "sent.json").read_text())
    except (OSError, ValueError, RecursionError):
        return {}
    return states if isinstance(states, dict) and all(isinstance(state, dict) for state in states.values()) else {}


def store_name(uri):
    """A store's name in sent.json: its URI may carry a password."""
    return hashlib.sha256(uri.encode()).hexdigest()[:16]
