"""The process that sends records to MLflow, beside the stages; killed and started again it loses nothing."""

import contextlib
import os
import time
from pathlib import Path

from filelock import FileLock, Timeout

from stages.files.artifacts import write_atomically
from stages.tracking.records import ALL_SENT, FAILURE, RECORDS, is_alive, is_sent, unsent
from stages.tracking.redaction import redacted, say
from stages.tracking.servers import complaint, require_connection, tracking_uri
from stages.tracking.store import Store, stall_guard

QUEUE_S = 120.0  # how long to wait for another mirror that is sending
FOLLOW_S = 5.0  # between two reads of a running stage's record
RETRY_S = 30.0  # between two tries while a stage runs and the server does not answer
KEPT = "the run is kept; send it later with: python -m stages.tracking sync"


class Sender:
    """Sends to the store of MLFLOW_TRACKING_URI, one process at a time; imports MLflow once it answers."""

    def __init__(self, root):
        self.root, self.uri, self.store = root, tracking_uri(root), None

    @contextlib.contextmanager
    def turn(self, seconds):
        """Holds the locks of the checkout and of a SQLite file: two mirrors that create one new store break it."""
        require_connection(self.uri)
        paths = [self.root / RECORDS / "sync.lock"]
        if self.uri.startswith("sqlite:///"):
            paths.append(Path(self.uri.removeprefix("sqlite:///") + ".lock"))
        with contextlib.ExitStack() as stack:
            for path in paths:
                path.parent.mkdir(parents=True, exist_ok=True)
                stack.enter_context(FileLock(path, timeout=seconds))
            yield

    def send(self, folder):
        """Sends one record; returns whether its stage is running, and why the store refused it, if it did."""
        with _hushed(), stall_guard():
            self.store = self.store or Store(self.uri, self.root)
            return self.store.send_or_say_why(folder)


def send(root, folder=None, backlog=True, quiet=False, sender=None):
    """Send this record, then the backlog; 0 when all are sent, 1 when some are not, and a line says why."""
    sender = sender or Sender(root)
    sent, refusals = {}, []  # record -> was its stage running when it was sent?
    try:
        with sender.turn(QUEUE_S):
            while waiting := _waiting(root, folder, backlog, sender.uri, sent):
                sent[waiting[0]], reason = sender.send(waiting[0])
                if reason:
                    refusals.append(f"MLflow at {sender.uri} refused {waiting[0].name} ({reason}); {KEPT}")
                elif not quiet:
                    print(f"sent {waiting[0].name}" + (" so far: its stage is running" if sent[waiting[0]] else ""))
            _tell(root / FAILURE, refusals)
    except Timeout:  # the process that holds the lock sends this record too
        if not quiet:
            say(f"another process has been sending for {QUEUE_S:.0f} s: repeat this when it has ended")
        return 1
    except Exception as error:  # any failure of a tracker has one meaning here: later
        _tell(root / FAILURE, [*refusals, f"{complaint(error, sender.uri)}; {KEPT}"])
        return 1
    if not quiet and not sent:
        print(ALL_SENT)
    return 1 if refusals else 0


def follow(root, folder):
    """Send a running stage's record every few seconds; after its end send the rest and the backlog."""
    sender, seen = Sender(root), 0
    while is_alive(folder):
        size, pause = (folder / "events.jsonl").stat().st_size, FOLLOW_S
        if size != seen:
            try:
                with sender.turn(seconds=0):
                    sender.send(folder)
                seen = size
            except Timeout:  # another process is sending: it takes this record, too, or this one does later
                pass
            except Exception:  # reported at the end, if it still fails
                pause = RETRY_S
        _await_end(folder, pause)
    return send(root, folder, quiet=True, sender=sender)


def _await_end(folder, seconds):
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline and is_alive(folder):
        time.sleep(0.5)


def _waiting(root, folder, backlog, uri, sent):
    """What is still to send: others end while this process sends. A stage that ran by then may have ended."""
    folders = [folder] if folder else []
    folders += unsent(root) if backlog else []
    return [each for each in dict.fromkeys(folders) if not is_sent(each, uri)
            and (each not in sent or sent[each] and not is_alive(each))]


def _tell(path, messages):
    """On stderr, and in a file for who cannot see it: the status, and a stage whose stderr is a pipe."""
    for message in messages:
        say(message)
    if messages:
        write_atomically(path, redacted(messages[-1]))
    else:
        path.unlink(missing_ok=True)


@contextlib.contextmanager
def _hushed():
    """MLflow's links, progress bars and advice would fall into the output of whatever stage runs by then."""
    with open(os.devnull, "w") as null, contextlib.redirect_stdout(null), contextlib.redirect_stderr(null):
        yield
