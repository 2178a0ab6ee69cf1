"""The record of a run: an append-only `events.jsonl` that a stage writes, and that a mirror sends to MLflow.

A stage never talks to MLflow. It appends lines to `.runs/tracking/<run>/events.jsonl`, which cannot block;
when it ends, a process of its own (`stages/mirror.py`, the only importer of MLflow) sends the record on.
A server that is down costs nothing but a message; what it missed goes out later, complete and once:

    python -m stages.tracking status                        # what waits to be sent, and why
    python -m stages.tracking sync                          # everything that no store has seen whole
    python -m stages.tracking sync .runs/tracking/<run>     # this run, to the store of MLFLOW_TRACKING_URI

Once a store has a run whole, the weights that its record held are let go; the rest is small and stays.
"""

import atexit
import contextlib
import dataclasses
import fcntl
import hashlib
import importlib.metadata
import json
import os
import platform
import re
import shutil
import stat
import subprocess
import sys
import time
import uuid
from pathlib import Path

import yaml

from stages.artifacts import ROOT, link_or_copy, sha256_of

RECORDS = Path(".runs/tracking")
ALL_SENT = "everything is sent"
FAILURE = RECORDS / "failure.txt"  # why the last mirror did not send all; absent when it did
BY_HAND_WAIT_S = 10.0  # a run by hand on the local store is in MLflow when the prompt returns
SHORTEST_SECRET = 8  # a shorter value of a variable is too likely a word of the text

_URI_SECRET = re.compile(r"(?<=://)[^/\s'\"]*@")  # user:password@, up to the last @ before the path
_QUERY_SECRET = re.compile(r"(?i)\b(password|secret|token|access_token|api_?key|sig|signature)=[^&\s'\"]+")
_TOKEN = re.compile(r"\b(hf_|ghp_|github_pat_|sk-)[A-Za-z0-9_-]{16,}")
_SECRET_KEY = re.compile(r"(?i)(password|passwd|secret|api_?key|access_key|credential|auth_token)")
_SECRET_VARIABLE = re.compile(r"(?i)(token|secret|passw|passphrase|credential|(^|_)(api_?)?(key|pass|auth)(_|$))")
_URI_PASSWORD = re.compile(r"://[^/\s:]*:([^/\s]+)@")


def redacted(text):
    """The text without passwords and tokens: those of the environment, and what URIs and settings may carry."""
    text = str(text)
    for secret in _secrets_of_the_environment():
        text = text.replace(secret, "***")
    text = _URI_SECRET.sub("***@", text)
    return _TOKEN.sub(r"\1***", _QUERY_SECRET.sub(r"\1=***", text))


def _secrets_of_the_environment():
    """Values of variables with a secret's name, and passwords in the URIs of any variable; longest first."""
    values = {value for name, value in os.environ.items() if _SECRET_VARIABLE.search(name)}
    values.update(*(_URI_PASSWORD.findall(value) for value in os.environ.values()))
    return sorted((value for value in values if len(value) >= SHORTEST_SECRET), key=len, reverse=True)


def flat(values, prefix=""):
    """Nested settings as dotted keys, the form in which MLflow compares runs; a secret's value is hidden."""
    if dataclasses.is_dataclass(values) and not isinstance(values, type):
        values = dataclasses.asdict(values)
    if not isinstance(values, dict):
        name = prefix.rstrip(".")
        return {name: "***" if _SECRET_KEY.search(name.rsplit(".", 1)[-1]) and values else values}
    parts = [flat(inner, f"{prefix}{name}.") for name, inner in values.items()]
    return {key: value for part in parts for key, value in part.items()}


class Run:
    """What a stage says about itself. Nothing here raises; a record that fails says so once."""

    def __init__(self, folder=None, root=None):
        self.folder, self.root = folder, root  # folder None: the null run, which accepts everything
        self.failed = False
        self._file = self._alive = None
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
                self._event("artifact", file=self._keep(Path(path), _copy_redacted), name=Path(path).name)

    def tag(self, key, value):
        self._event("tag", key=str(key), value=str(value))

    def model(self, folder, tokenizer=None):
        """The model in this folder, with the tokenizer, so that mlflow.pyfunc.load_model generates text."""
        with self._quietly():
            if self.folder:
                tokenizer = Path(tokenizer or self.root / "artifacts/data")
                # Linked, not copied: models are large, and replaced by renaming, never written in place.
                kept = self._keep(Path(folder), link_or_copy)
                for name, copy in (("tokenizer.json", shutil.copy2), ("card.json", _copy_redacted)):
                    if (tokenizer / name).exists():
                        self._keep(tokenizer / name, copy, under=f"{kept}.tokenizer")
                self._event("model", name=Path(folder).name, file=kept, sha256=sha256_of(folder),
                            folder=str(Path(folder).resolve()), tokenizer=str(tokenizer.resolve()))

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
                fields = _redacted_within(fields)
            line = json.dumps({"kind": kind, "time": time.time(), **fields}, ensure_ascii=False, default=str)
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
                _say(f"tracking: a part of this run is not recorded ({type(error).__name__}: {error})")

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


def _redacted_within(value):
    """The value with every string in it redacted, keys left alone."""
    if isinstance(value, dict):
        return {key: _redacted_within(inner) for key, inner in value.items()}
    if isinstance(value, (list, tuple)):
        return [_redacted_within(inner) for inner in value]
    return redacted(value) if isinstance(value, (str, Path)) else value


def read_lines(path):
    """The whole JSON lines of a file; what a kill or a full disk cut short is passed over."""
    lines = []
    for line in path.read_bytes().split(b"\n")[:-1]:  # the last piece has no line end: empty, or torn
        with contextlib.suppress(ValueError, RecursionError):
            lines.append(json.loads(line))
    return [line for line in lines if isinstance(line, dict) and _names_own_file(line)]


def _names_own_file(event):
    """A record names only what `_keep` put into it: the mirror sends such files, and removes them."""
    return "file" not in event or re.fullmatch(r"files/\d+-[^/]+", str(event["file"])) is not None


@contextlib.contextmanager
def start_run(stage, settings, out, root, sweep=None):
    """Record one stage, from its settings to how it ended, and hand the record to the mirror at the end."""
    root, out = Path(root), Path(out)
    run = Run(root=root)
    store = store_root(root)
    deps, outs = [], []
    with run._quietly():
        run.folder = store / RECORDS / f"{time.strftime('%Y%m%d-%H%M%S')}-{stage}-{uuid.uuid4().hex[:8]}"
        run._open()
        deps, outs = _files_of(stage, root)
        run._event("start", **_identity(stage, settings, out, root, sweep, deps))
        run.text("settings.yaml", yaml.safe_dump(_plain(settings), sort_keys=False, allow_unicode=True))
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
        run.tag("error", redacted(f"{type(error).__name__}: {error}")[:500])  # a secret cut in two is not found
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
        with run._quietly():
            if (run.folder / "events.jsonl").exists():
                _start_mirror(run.folder, store)


def store_root(root):
    """Where records and the default store live: the user's checkout, also when DVC runs a temporary copy."""
    under_dvc = "DVC_STAGE" in os.environ and os.environ.get("DVC_ROOT")
    return Path(under_dvc or root).resolve()


def _identity(stage, settings, out, root, sweep, deps):
    """What the mirror needs to name the run, find its parent and tag it, as known when the stage starts."""
    commit = _git(root, "rev-parse", "HEAD")
    resolved = sha256_of(root / "resolved.yaml") if (root / "resolved.yaml").exists() else ""
    name, key, parent = stage, None, None
    if sweep is not None:
        sweep = Path(sweep)
        overrides = out / ".hydra/overrides.yaml"
        words = yaml.safe_load(overrides.read_text()) if overrides.exists() else None
        name = " ".join([stage, *(word.removeprefix(f"{stage}.") for word in words or [out.name])])
        key, parent = f"sweep-{stage}-{sweep.name}", f"sweep {stage} {sweep.name}"
    elif os.environ.get("DVC_EXP_NAME"):
        key = parent = os.environ["DVC_EXP_NAME"]
    elif out.resolve() == root.resolve():  # dvc repro; a run by hand stands alone
        key = f"repro-{commit[:12]}-{resolved[:12]}"
        parent = " ".join(filter(None, ["repro", *_sheet_words(root), commit[:8]]))
    # Only what a person edits: DVC itself rewrites dvc.lock and metrics while the pipeline runs.
    edited = _git(root, "status", "--porcelain", "--", "stages", "conf", "params.yaml", "dvc.yaml")
    tags = {
        "git.commit": commit,
        "git.dirty": str(bool(edited)),
        "mlflow.source.name": f"stages/{stage}.py",
        "mlflow.source.git.commit": commit,
        "dvc.lock": sha256_of(root / "dvc.lock") if (root / "dvc.lock").exists() else "",
        "dvc.experiment": os.environ.get("DVC_EXP_NAME", ""),
        "dvc.baseline": os.environ.get("DVC_EXP_BASELINE_REV", ""),
        "resolved.sha256": resolved,
        "engine": f"torch {_version('torch')}, lightning {_version('lightning')}",
        **machine(),
    }
    for path in deps:
        if (root / path).exists():
            tags[f"in.{path}"] = sha256_of(root / path)
    return {
        "stage": stage,
        "name": name,
        "pipeline": key,
        "parent": parent,
        "params": {key: str(value) for key, value in flat(settings).items()},
        "tags": {key: value for key, value in tags.items() if value},
    }


def machine():
    """What speed depends on, without importing torch: cores, processor, accelerator, versions."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    processor = platform.processor() or platform.machine()
    with contextlib.suppress(OSError, StopIteration):
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        processor = next(line for line in lines if line.startswith("model name")).split(":", 1)[1].strip()
    accelerators = []
    for path in sorted(Path("/proc/driver/nvidia/gpus").glob("*/information")):
        with contextlib.suppress(OSError):
            accelerators += re.findall(r"^Model:\s*(.+)$", path.read_text(), re.MULTILINE)
    return {
        "machine.cores": str(cores),
        "machine.processor": processor,
        "machine.accelerator": f"{len(accelerators)} x {accelerators[0]}" if accelerators else "none",
        "machine.python": platform.python_version(),
        "machine.torch": _version("torch"),
    }


def _version(package):
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "missing"


def _plain(settings):
    """Settings as YAML can write them, secrets hidden."""
    if dataclasses.is_dataclass(settings) and not isinstance(settings, type):
        settings = dataclasses.asdict(settings)
    if isinstance(settings, dict):
        return {str(key): "***" if _SECRET_KEY.search(str(key)) and isinstance(value, str) else _plain(value)
                for key, value in settings.items()}
    if isinstance(settings, (list, tuple)):
        return [_plain(value) for value in settings]
    return settings if isinstance(settings, (bool, int, float, type(None))) else str(settings)


def _sheet_words(root):
    """The words of params.yaml that say which experiment this is."""
    if not (root / "params.yaml").exists():
        return []
    sheet = yaml.safe_load((root / "params.yaml").read_text()) or {}
    return [str(sheet[word]) for word in ("scale", "corpus") if word in sheet]


def _files_of(stage, root):
    """The data that dvc.yaml says the stage reads and writes; code is named by the commit instead."""
    if not (root / "dvc.yaml").exists():
        return [], []
    entry = (yaml.safe_load((root / "dvc.yaml").read_text()) or {}).get("stages", {}).get(stage, {})
    named = {kind: [next(iter(item)) if isinstance(item, dict) else item for item in entry.get(kind) or []]
             for kind in ("deps", "outs", "metrics", "plots")}
    deps = [path for path in named["deps"] if not path.startswith(("stages", "conf"))]
    return deps, named["outs"] + named["metrics"] + named["plots"]


def _record_data(run, root):
    """Which data: the corpus card names every shard by its hash, so its own hash names them all."""
    card_path = root / "artifacts/data/card.json"
    if card_path.exists():
        card = json.loads(card_path.read_text())
        profile = {split: {key: value for key, value in counts.items() if key != "shards"}
                   for split, counts in card.get("splits", {}).items()}
        run._event("dataset", name=redacted(json.dumps(card.get("corpus", "corpus")).strip('"'))[:200],
                   digest=sha256_of(card_path)[:32], profile=profile)


def _record_results(run, stage, out):
    """The curves, and the clock's numbers (tokens per second, seconds), which no DVC out may hold."""
    for curve in sorted((out / "plots" / stage).glob("*.csv")):
        run.artifact(curve)
    measured = out / f"measurements/{stage}.json"
    if measured.exists():
        run.metrics(flat(json.loads(measured.read_text()), "measured."))


def _git(root, *words):
    words = ("git", "-C", str(root), *words)
    try:
        return subprocess.run(words, capture_output=True, text=True, timeout=10).stdout.strip()
    except (OSError, subprocess.TimeoutExpired):
        return ""


def _copy_redacted(source, target):
    content = Path(source).read_bytes()
    with contextlib.suppress(UnicodeDecodeError):
        content = redacted(content.decode()).encode()
    Path(target).write_bytes(content)


_mirrors: list[subprocess.Popen] = []  # that this process waits for before it ends


def _start_mirror(folder, store):
    """Send the record from a process of its own, in the background: the next stage need not wait for it."""
    home = store if (store / "stages/tracking.py").exists() else ROOT  # a temporary copy may vanish
    path = os.pathsep.join(filter(None, [str(home), os.environ.get("PYTHONPATH")]))
    environment = {**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1"}
    words = [sys.executable, "-m", "stages.tracking", "sync", str(folder), "--mirror", "--root", str(store)]
    streams = {"stdin": subprocess.DEVNULL, "stdout": subprocess.DEVNULL, "stderr": None}
    if _is_pipe(2):
        # Whoever reads the pipe waits until its last writer is gone: it must not be the mirror. So this
        # process says what the mirror before it could not.
        streams["stderr"] = subprocess.DEVNULL
        with contextlib.suppress(FileNotFoundError):
            _say((store / FAILURE).read_text(encoding="utf-8"))
    process = subprocess.Popen(words, cwd=home, env=environment, start_new_session=True, **streams)
    if "DVC_STAGE" not in os.environ and "MLFLOW_TRACKING_URI" not in os.environ:
        if not _mirrors:
            atexit.register(_wait_for_mirrors)
        _mirrors.append(process)


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


def is_alive(folder):
    """Is the stage that writes this record still running?"""
    with open(folder / "alive", "a") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_SH | fcntl.LOCK_NB)  # shared: two that ask at once do not see each other
        except BlockingIOError:
            return True
    return False


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


def _say(message):
    print(f"offramp: {redacted(message)}", file=sys.stderr, flush=True)


def _print_status(root):
    """What waits, how much of it any store has, and why the last mirror did not send it."""
    waiting = unsent(root)
    for folder in waiting:
        events = read_lines(folder / "events.jsonl")
        running = is_alive(folder)
        end = "running" if running else events[-1].get("status", "KILLED") if events else "KILLED"
        sent = max([state["events"] for state in read_sent(folder).values()], default=0)
        print(f"{RECORDS / folder.name}  {end}  {sent} of {len(events)} events sent")
    print(f"{len(waiting)} runs wait to be sent: python -m stages.tracking sync" if waiting else ALL_SENT)
    with contextlib.suppress(FileNotFoundError):
        print(f"last failure: {(root / FAILURE).read_text(encoding='utf-8')}")


def main(words):
    """`sync [folder]`, `status`; `--mirror` is how a stage calls it: its own run first, then the backlog."""
    import argparse

    parser = argparse.ArgumentParser(prog="python -m stages.tracking", description=__doc__.splitlines()[0])
    parser.add_argument("command", choices=["sync", "status"])
    parser.add_argument("folder", nargs="?", type=Path, help="a record to send; default: all unsent")
    parser.add_argument("--root", type=Path, default=ROOT, help=argparse.SUPPRESS)
    parser.add_argument("--mirror", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_intermixed_args(words)
    root, folder = options.root.resolve(), options.folder and options.folder.resolve()
    if options.command == "status":
        return _print_status(root)
    if folder and not (folder / "events.jsonl").exists():
        parser.error(f"{folder} holds no events.jsonl: name a folder under {RECORDS}")
    if not folder and not unsent(root):
        print(ALL_SENT)
        return 0
    if options.mirror and hasattr(os, "nice"):
        os.nice(10)  # the next stage goes first

    from stages import mirror  # MLflow takes two seconds to import, and no stage pays for it

    return mirror.send(root, folder, backlog=options.mirror or not folder, quiet=options.mirror)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
