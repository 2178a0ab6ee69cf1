"""The record of a run: an append-only `events.jsonl` that a stage writes, and that a mirror sends to MLflow.

A stage never talks to MLflow. It appends lines to `.runs/tracking/<run>/events.jsonl`, which cannot block. A process
of its own (mirror.py) sends the record on: of a training stage while it trains, of the others at their end.
A server that is down costs nothing but a message; what it missed goes out later, complete and once:

    python -m stages.tracking status                        # what waits to be sent, and why
    python -m stages.tracking sync                          # everything that no store has seen whole
    python -m stages.tracking sync .runs/tracking/<run>     # this run, to the store of MLFLOW_TRACKING_URI

Once a store has a run whole, the weights that its record held are let go; the rest is small and stays.
"""

import atexit
import contextlib
import fcntl
import json
import os
import shutil
import stat
import subprocess
import sys
import time
import uuid
from pathlib import Path

import yaml

from stages.files.artifacts import ROOT, checkout_root, link_or_copy, sha256_of
from stages.tracking.identity import dataset, files_of, identity
from stages.tracking.records import (
    FAILURE,
    RECORDS,
)
from stages.tracking.redaction import copy_redacted, flat, plain, redacted_line, redacted_within, say

BY_HAND_WAIT_S = 10.0  # a run by hand on the local store is in MLflow when the prompt returns


class Run:
    """What a stage records about itself. Nothing here raises; a failing record prints one line."""

    def __init__(self, folder=None, root=None):
        self.folder, self.root = folder, root  # folder None: the null run, which accepts everything
        self.failed = False
        self._file = self._alive = self._mirror = None
        self._torn = False

    def metrics(self, values, step=None, at=None):
        """Numbers by name; with a step they make a curve, without one they are a result. `at`: Unix seconds."""
        numbers = {}
        for name, value in flat(values).items():
            with contextlib.suppress(TypeError, ValueError):
                numbers[name] = float(value)
        if numbers:
            self._event("metrics", values=numbers, step=step, **({} if at is None else {"time": at}))

    def text(self, name, text):
        """A small text shown beside the run, such as generated samples."""
        self._event("text", name=str(name), text=text)

    def artifact(self, path):
        """A file or folder to show beside the run; copied, since the next run of the stage replaces it."""
        with self._quietly():
            if self.folder:
                self._event("artifact", file=self._keep(Path(path), copy_redacted), name=Path(path).name)

    def tag(self, key, value):
        self._event("tag", key=str(key), value=str(value))

    def model(self, folder, tokenizer=None):
        """The model in this folder, with the tokenizer, so that mlflow.pyfunc.load_model generates text."""
        with self._quietly():
            if self.folder:
                tokenizer = Path(tokenizer or self.root / "artifacts/data")
                # Linked, not copied: models are large, and replaced by renaming, never written in place.
                kept = self._keep(Path(folder), link_or_copy)
                for name, copy in (("tokenizer.json", shutil.copy2), ("card.json", copy_redacted)):
                    if (tokenizer / name).exists():
                        self._keep(tokenizer / name, copy, under=f"{kept}.tokenizer")
                self._event("model", name=Path(folder).name, file=kept, sha256=sha256_of(folder),
                            folder=str(Path(folder).resolve()), tokenizer=str(tokenizer.resolve()))

    def follow(self):
        """Makes the mirror send while the stage runs, not only at its end."""
        with self._quietly():
            if self._file is not None:
                self._mirror = _start_mirror(self.folder, checkout_root(self.root))

    def _keep(self, path, copy, under=None):
        """Put a file or folder into the record, under a name of its own; returns that name."""
        name = under or f"files/{len(list((self.folder / 'files').glob('*')))}-{path.name}"
        target = self.folder / name
        if path.is_dir():
            shutil.copytree(path, target, copy_function=copy)
        elif under:
            target.mkdir(parents=True, exist_ok=True)
            copy(path, target / path.name)
        else:
            target.parent.mkdir(parents=True, exist_ok=True)
            copy(path, target)
        return name

    def _event(self, kind, **fields):
        with self._quietly():
            if self._file is None:
                return
            if kind != "metrics":  # numbers hold no secret
                fields = redacted_within(fields)
            line = json.dumps({"kind": kind, "time": time.time(), **fields}, ensure_ascii=False, default=str)
            line = line.encode("utf-8", "surrogatepass").decode("utf-8", "replace")  # bytes of a name that is not UTF-8
            # After a line cut short by a full disk the next one starts afresh.
            line, self._torn = ("\n" if self._torn else "") + line + "\n", True
            self._file.write(line)
            self._torn = False

    @contextlib.contextmanager
    def _quietly(self):
        try:
            yield
        except Exception as error:  # tracking may lose a line, never a stage
            if not self.failed:
                self.failed = True
                say(f"tracking: a part of this run is not recorded ({type(error).__name__}: {error})")

    def _open(self):
        self.folder.mkdir(parents=True)
        # Held while the stage lives, so that the mirror can tell a running stage from a killed one.
        self._alive = open(self.folder / "alive", "w")
        fcntl.flock(self._alive, fcntl.LOCK_EX)
        self._file = open(self.folder / "events.jsonl", "a", encoding="utf-8", buffering=1)

    def _close(self):
        with self._quietly():
            if self._file is not None:
                file, self._file = self._file, None
                file.close()
            if self._alive is not None:
                self._alive.close()
            mirrored = self._mirror is not None and self._mirror.poll() is None
            if not mirrored and self.folder and (self.folder / "events.jsonl").exists():
                _start_mirror(self.folder, checkout_root(self.root))


@contextlib.contextmanager
def start_run(stage, settings, out, root, sweep=None):
    """Record one stage, from its settings to how it ended, and hand the record to the mirror at the end."""
    root, out = Path(root), Path(out)
    run = Run(root=root)
    deps, outs = [], []
    with run._quietly():
        run.folder = checkout_root(root) / RECORDS / f"{time.strftime('%Y%m%d-%H%M%S')}-{stage}-{uuid.uuid4().hex[:8]}"
        run._open()
        deps, outs = files_of(stage, root)
        run._event("start", **identity(stage, settings, out, root, sweep, deps))
        run.text("settings.yaml", yaml.safe_dump(plain(settings), sort_keys=False, allow_unicode=True))
        if "artifacts/data" in " ".join(deps):
            _record_data(run, root)
    status = "FAILED"
    try:
        yield run
        status = "FINISHED"
    except KeyboardInterrupt:
        status = "KILLED"
        raise
    except SystemExit as error:
        status = "FINISHED" if error.code in (0, None) else "FAILED"
        raise
    except BaseException as error:
        run.tag("error", redacted_line(f"{type(error).__name__}: {error}", 500))
        raise
    finally:
        with run._quietly():
            if status == "FINISHED":
                for path in outs:
                    if (out / path).exists():
                        run.tag(f"out.{path}", sha256_of(out / path))
                if stage == "prepare":
                    _record_data(run, out)
                _record_results(run, stage, out)
        run._event("end", status=status)
        run._close()


def _record_data(run, root):
    data = dataset(root)
    if data:
        run._event("dataset", **data)


def _record_results(run, stage, out):
    """The curves, and the clock's numbers (tokens per second, seconds), which no DVC out may hold."""
    for curve in sorted((out / "plots" / stage).glob("*.csv")):
        run.artifact(curve)
    measured = out / f"measurements/{stage}.json"
    if measured.exists():
        run.metrics(flat(json.loads(measured.read_text()), "measured."))


_mirrors: list[subprocess.Popen] = []  # that this process waits for before it ends


def _start_mirror(folder, store):
    """Send the record from a process of its own: it goes on after this one, and the next stage need not wait."""
    home = store if (store / "stages/tracking/__main__.py").exists() else ROOT  # a temporary copy may vanish
    path = os.pathsep.join(filter(None, [str(home), os.environ.get("PYTHONPATH")]))
    environment = {**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1"}
    words = [sys.executable, "-m", "stages.tracking", "sync", str(folder), "--mirror", "--root", str(store)]
    streams = {"stdin": subprocess.DEVNULL, "stdout": subprocess.DEVNULL, "stderr": None}
    if sys.stderr is None:  # closed: descriptor 2 may be any file by now
        streams["stderr"] = subprocess.DEVNULL
    elif _is_pipe(2):
        # Whoever reads the pipe waits until its last writer is gone: it must not be the mirror. So this
        # process says what the mirror before it could not.
        streams["stderr"] = subprocess.DEVNULL
        with contextlib.suppress(FileNotFoundError):
            say((store / FAILURE).read_text(encoding="utf-8"))
    process = subprocess.Popen(words, cwd=home, env=environment, start_new_session=True, **streams)
    if "DVC_STAGE" not in os.environ and "MLFLOW_TRACKING_URI" not in os.environ:
        if not _mirrors:
            atexit.register(_wait_for_mirrors)
        _mirrors.append(process)
    return process


def _is_pipe(descriptor):
    try:
        mode = os.fstat(descriptor).st_mode
    except OSError:  # closed
        return True
    return stat.S_ISFIFO(mode) or stat.S_ISSOCK(mode)


def _wait_for_mirrors():
    deadline = time.monotonic() + BY_HAND_WAIT_S
    with contextlib.suppress(subprocess.TimeoutExpired, KeyboardInterrupt):
        for process in _mirrors:
            process.wait(max(0.0, deadline - time.monotonic()))
