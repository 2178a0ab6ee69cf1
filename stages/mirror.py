"""Sends the records of `stages/tracking.py` to MLflow; runs as a process of its own and is safe to run again.

What was sent is remembered per store in `sent.json` beside the record. A kill between sending and
remembering does no harm: runs are found by a tag before they are made, metrics carry the time of their event
(an equal row is one row), everything else replaces what has its name.
"""

import contextlib
import os
import shutil
import socket
import tempfile
import urllib.parse
import urllib.request
from pathlib import Path

from filelock import FileLock, Timeout

from stages import tracking
from stages.artifacts import ROOT, sha256_of, write_json

# Before MLflow is imported: no telemetry, no minutes of retries, no chatter from its Git library.
os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
os.environ.setdefault("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "1")
os.environ.setdefault("MLFLOW_HTTP_REQUEST_TIMEOUT", "5")
os.environ.setdefault("GIT_PYTHON_REFRESH", "quiet")
os.environ.setdefault("MLFLOW_LOGGING_LEVEL", "ERROR")

EXPERIMENT = "offramp"
CONNECT_S = 2.0  # a server that does not take a connection in this time is down
QUEUE_S = 120.0  # how long to wait for another mirror that is sending
BATCH = 500  # metrics in one request; MLflow takes 1000 entities
KEPT = "the run is kept; send it later with: python -m stages.tracking sync"


def tracking_uri(root):
    """MLFLOW_TRACKING_URI, or SQLite in the checkout; a relative SQLite path starts at the root."""
    uri = os.environ.get("MLFLOW_TRACKING_URI") or "sqlite:///mlflow.db"
    if uri.startswith("sqlite:///"):
        uri = f"sqlite:///{(root / uri.removeprefix('sqlite:///')).resolve()}"
    return uri


def send(folders, root, quiet=False):
    """Send each record; 0 when all are sent, 1 when the store was not reached, and a line says what to do."""
    uri = tracking_uri(root)
    try:
        _require_connection(uri)
        with contextlib.ExitStack() as locks:
            for lock in _locks(uri, root):
                locks.enter_context(lock)
            folders = [folder for folder in folders if not tracking.is_sent(folder, uri)]
            if not folders:
                return 0
            with _hushed():
                client = _Client(uri, root)
            for folder in folders:
                with _hushed():
                    client.send(folder)
                if not quiet:
                    print(f"sent {folder.name}")
    except Timeout:
        return 1  # whoever holds the lock is sending, and finds this record on its next turn
    except Exception as error:  # any failure of a tracker has one meaning here: later
        reason = str(error).splitlines()[0][:160] if str(error) else ""
        tracking._say(f"MLflow at {uri} was not reached ({type(error).__name__}: {reason}); {KEPT}")
        return 1
    return 0


@contextlib.contextmanager
def _hushed():
    """MLflow's links, progress bars and advice would fall into the output of whatever stage runs by then."""
    with open(os.devnull, "w") as null, contextlib.redirect_stdout(null), contextlib.redirect_stderr(null):
        yield


def _require_connection(uri):
    """Fail within seconds where nothing listens, before MLflow is imported."""
    parts = urllib.parse.urlsplit(uri)
    if parts.scheme not in ("http", "https") or not parts.hostname:
        return
    if parts.scheme in urllib.request.getproxies() and not urllib.request.proxy_bypass(parts.hostname):
        return  # a proxy makes the connection
    port = parts.port or (443 if parts.scheme == "https" else 80)
    socket.create_connection((parts.hostname, port), timeout=CONNECT_S).close()


def _locks(uri, root):
    """One mirror at a time per checkout and per SQLite file: two that create the same new store break it."""
    paths = [root / tracking.RECORDS / "sync.lock"]
    if uri.startswith("sqlite:///"):
        paths.append(Path(uri.removeprefix("sqlite:///") + ".lock"))
    for path in paths:
        path.parent.mkdir(parents=True, exist_ok=True)
    return [FileLock(path, timeout=QUEUE_S) for path in paths]


class _Client:
    """MLflow as this project uses it: one experiment, a parent per pipeline execution, a child per stage."""

    def __init__(self, uri, root):
        import mlflow

        self.uri, self.root, self.mlflow = uri, root, mlflow
        mlflow.set_tracking_uri(uri)
        self.client = mlflow.MlflowClient(uri)
        name = os.environ.get("MLFLOW_EXPERIMENT_NAME", EXPERIMENT)
        found = self.client.get_experiment_by_name(name)
        if found is None:
            # Named outright: MLflow's own default is the working folder of whoever came first.
            place = None
            if uri.startswith("sqlite:///"):
                place = (Path(uri.removeprefix("sqlite:///")).parent / "mlartifacts").as_uri()
            try:
                self.experiment = self.client.create_experiment(name, artifact_location=place)
            except mlflow.exceptions.MlflowException:  # another machine was first
                self.experiment = self.client.get_experiment_by_name(name).experiment_id
        else:
            self.experiment = found.experiment_id

    def send(self, folder):
        """Send what the store has not seen of one record, and remember each step of it."""
        alive = tracking.is_alive(folder)  # asked before reading: whoever is dead then writes nothing more
        events = tracking.read_lines(folder / "events.jsonl")
        state = tracking.read_sent(folder).get(tracking.store_name(self.uri), {"events": 0, "done": False})
        if not events or events[0]["kind"] != "start":
            return self._remember(folder, {**state, "done": not alive})  # killed before it began
        start = events[0]
        run_id, parent_id = self._find_or_create(folder, start)
        position = state["events"]
        while position < len(events):
            count = self._send_from(events, position, folder, run_id, parent_id, start)
            position += count
            self._remember(folder, {"run_id": run_id, "events": position, "done": False})
        if not alive:
            end = events[-1]
            status = end["status"] if end["kind"] == "end" else "KILLED"
            self.client.set_terminated(run_id, status, end_time=_milliseconds(end))
            if parent_id:
                self.client.set_terminated(parent_id, "FINISHED", end_time=_milliseconds(end))
            self._remember(folder, {"run_id": run_id, "events": position, "done": True})
            for event in events:
                if event["kind"] == "model":  # the store has it; links would keep old weights on the disk
                    shutil.rmtree(folder / event["file"], ignore_errors=True)

    def _remember(self, folder, state):
        write_json(folder / "sent.json", {**tracking.read_sent(folder), tracking.store_name(self.uri): state})

    def _find_or_create(self, folder, start):
        found = self._find(f"tags.`offramp.record` = '{folder.name}'")
        if found:
            return found.info.run_id, found.data.tags.get("mlflow.parentRunId")
        tags = {"offramp.record": folder.name, "offramp.kind": start["stage"]}
        tags |= {"mlflow.runName": start["name"]}
        parent_id = None
        if start["pipeline"]:
            parent_id = self._parent(start)
            tags |= {"pipeline.key": start["pipeline"], "mlflow.parentRunId": parent_id}
        run = self.client.create_run(self.experiment, start_time=_milliseconds(start), tags=tags)
        return run.info.run_id, parent_id

    def _parent(self, start):
        key = start["pipeline"].replace("'", "")
        found = self._find(f"tags.`pipeline.key` = '{key}' and tags.`offramp.kind` = 'pipeline'")
        if found:
            return found.info.run_id
        tags = {"mlflow.runName": start["parent"], "pipeline.key": key, "offramp.kind": "pipeline"}
        shared = ("git.", "mlflow.source.git", "machine.", "engine", "resolved.", "dvc.exp", "dvc.baseline")
        tags |= {name: value for name, value in start["tags"].items() if name.startswith(shared)}
        return self.client.create_run(self.experiment, start_time=_milliseconds(start), tags=tags).info.run_id

    def _find(self, condition):
        return next(iter(self.client.search_runs([self.experiment], condition, max_results=1)), None)

    def _send_from(self, events, position, folder, run_id, parent_id, start):
        """Send the event at this position, or all metric events in a row from there; returns how many."""
        event = events[position]
        kind = event["kind"]
        if kind == "metrics":
            summary_id = parent_id if start["stage"] == "evaluate" else None
            return self._send_metrics(events, position, run_id, summary_id)
        if kind == "start":
            self._send_start(event, run_id)
        elif kind == "tag":
            self.client.set_tag(run_id, _key(event["key"]), event["value"])
        elif kind == "text":
            self.client.log_text(run_id, event["text"], event["name"])
        elif kind == "artifact" and (folder / event["file"]).exists():
            self._send_artifact(folder / event["file"], event["name"], run_id)
        elif kind == "dataset":
            self._send_dataset(event, run_id)
        elif kind == "model":
            self._send_model(event, folder, run_id)
        return 1

    def _send_start(self, event, run_id):
        from mlflow.entities import Param, RunTag

        params = [Param(_key(name), str(value)[:6000]) for name, value in event["params"].items()]
        tags = [RunTag(_key(name), str(value)) for name, value in event["tags"].items()]
        for first in range(0, max(len(params), len(tags)), 100):
            self.client.log_batch(run_id, params=params[first:first + 100], tags=tags[first:first + 100])

    def _send_metrics(self, events, position, run_id, summary_id):
        from mlflow.entities import Metric

        metrics, results, count = [], [], 0
        for event in events[position:]:
            if event["kind"] != "metrics" or (metrics and len(metrics) + len(event["values"]) > BATCH):
                break
            count += 1
            for name, value in event["values"].items():
                metrics.append(Metric(_key(name), value, _milliseconds(event), event["step"] or 0))
                if event["step"] is None:
                    results.append(metrics[-1])
        for first in range(0, len(metrics), BATCH):
            self.client.log_batch(run_id, metrics=metrics[first:first + BATCH])
        if summary_id:  # what evaluation found stands on the parent too: pipelines compare in one table
            for first in range(0, len(results), BATCH):
                self.client.log_batch(summary_id, metrics=results[first:first + BATCH])
        return count

    def _send_artifact(self, path, name, run_id):
        if path.is_dir():
            return self.client.log_artifacts(run_id, str(path), name)
        with tempfile.TemporaryDirectory() as folder:  # MLflow names an artifact as its file is named
            named = Path(folder) / name
            shutil.copy2(path, named)
            self.client.log_artifact(run_id, str(named))

    def _send_dataset(self, event, run_id):
        from mlflow.data.code_dataset_source import CodeDatasetSource
        from mlflow.data.meta_dataset import MetaDataset
        from mlflow.entities import DatasetInput, InputTag

        source = CodeDatasetSource({"mlflow.source.name": "stages/prepare.py", "mlflow.source.type": "LOCAL"})
        dataset = MetaDataset(source, name=event["name"], digest=event["digest"])._to_mlflow_entity()
        dataset._profile = str(event["profile"])
        context = [InputTag("mlflow.data.context", "training")]
        self.client.log_inputs(run_id, [DatasetInput(dataset=dataset, tags=context)])

    def _send_model(self, event, folder, run_id):
        """Log the model as code plus files: nothing is pickled, and it loads where its requirements are."""
        condition = f"name = '{event['name']}' and source_run_id = '{run_id}'"
        logged = self.client.search_logged_models([self.experiment], condition)
        if any(model.status == "READY" for model in logged):
            return
        weights, tokenizer = folder / event["file"], folder / f"{event['file']}.tokenizer"
        if not weights.exists():  # sent to another store before; the original will do if it is still the same
            weights, tokenizer = Path(event["folder"]), Path(event["tokenizer"])
            if not weights.exists() or sha256_of(weights) != event["sha256"]:
                note = "the model was replaced before it could be sent"
                return self.client.set_tag(run_id, _key(f"missing.{event['name']}"), note)
        packages = ("torch", "tokenizers", "safetensors", "numpy")
        with tempfile.TemporaryDirectory() as staging, self.mlflow.start_run(run_id=run_id):
            small = Path(staging) / "tokenizer"
            small.mkdir()
            for name in ("tokenizer.json", "card.json"):
                if (tokenizer / name).exists():
                    shutil.copy2(tokenizer / name, small / name)
            code = Path(staging) / "stages"
            shutil.copytree(ROOT / "stages", code, ignore=shutil.ignore_patterns("__pycache__"))
            self.mlflow.pyfunc.log_model(
                name=event["name"],
                python_model=str(code / "served_model.py"),
                artifacts={"model": str(weights), "tokenizer": str(small)},
                code_paths=[str(code)],
                pip_requirements=[f"{name}=={tracking._version(name).split('+')[0]}" for name in packages],
                signature=_signature(),
            )


def _signature():
    """Text in, text out, and the options of generation with their defaults."""
    from mlflow.models import ModelSignature
    from mlflow.types import ColSpec, DataType, ParamSchema, ParamSpec, Schema

    text = Schema([ColSpec(DataType.string)])
    options = [ParamSpec("new_tokens", DataType.long, 64), ParamSpec("temperature", DataType.double, 0.0),
               ParamSpec("seed", DataType.long, 0)]
    return ModelSignature(text, Schema([ColSpec(DataType.string)]), ParamSchema(options))


def _milliseconds(event):
    return int(event["time"] * 1000)


def _key(name):
    """MLflow takes letters, digits and _-./: and spaces in a name, up to 250 of them."""
    return "".join(letter if letter.isalnum() or letter in "_-./: " else "_" for letter in str(name))[:250]
