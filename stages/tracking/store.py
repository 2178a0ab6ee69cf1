"""One store of MLflow: sends it the records of record.py. The only importer of MLflow besides the model.

What was sent is remembered per store in `sent.json` beside the record. A kill between sending and
remembering does no harm, nor does a server that dies before it answers: runs and models are looked for before
they are made, metrics carry the time of their event (an equal row is one row), everything else replaces what
has its name.
"""

import contextlib
import os
import shutil
import signal
import tempfile
import time
import uuid
from pathlib import Path

from stages.files.artifacts import ROOT, Refusal, sha256_of, write_atomically, write_json
from stages.tracking.identity import version
from stages.tracking.records import RECORDS, is_alive, read_lines, read_sent, store_name
from stages.tracking.servers import reason

# Before MLflow is imported: no telemetry, no minutes of retries, no chatter from its Git library. MLflow would
# retry any request, also "make a run" when only the answer was lost, and so make two: we look again instead.
os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
os.environ.setdefault("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
os.environ.setdefault("MLFLOW_HTTP_REQUEST_TIMEOUT", "10")
os.environ.setdefault("GIT_PYTHON_REFRESH", "quiet")
os.environ.setdefault("MLFLOW_LOGGING_LEVEL", "ERROR")

EXPERIMENT = "offramp"
TRIES = 3  # of one record, while the server answers
BATCH = 500  # metrics in one request; MLflow takes 1000 entities
STALL_S = 600  # no event sent in this time, such as a model: a server that trickles would hold the mirror for ever
CHECKOUT = RECORDS / "checkout"  # a random name for this checkout


@contextlib.contextmanager
def stall_guard():
    def stop(*_):
        raise TimeoutError(f"nothing was sent for {STALL_S} s")

    before = signal.signal(signal.SIGALRM, stop)
    _restart_stall_clock()
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def _restart_stall_clock():
    signal.setitimer(signal.ITIMER_REAL, STALL_S, STALL_S)  # again and again: MLflow may catch what is raised


class Store:
    """MLflow as this project uses it: one experiment, a parent per pipeline execution, a child per stage."""

    def __init__(self, uri, root):
        import mlflow

        self.uri, self.root, self.mlflow = uri, root, mlflow
        mlflow.set_tracking_uri(uri)
        self.client = mlflow.MlflowClient(uri)
        self.experiment = self._experiment(os.environ.get("MLFLOW_EXPERIMENT_NAME", EXPERIMENT))

    def _experiment(self, name):
        """The id of the experiment with this name, made where it is not there yet."""
        found = self.client.get_experiment_by_name(name)
        if found is None:
            # Explicit, because MLflow's default is the working folder of the process that created the store.
            place = None
            if self.uri.startswith("sqlite:///"):
                place = (Path(self.uri.removeprefix("sqlite:///")).parent / "mlartifacts").as_uri()
            try:
                return self.client.create_experiment(name, artifact_location=place)
            except self.mlflow.exceptions.MlflowException:  # another machine was first
                found = self.client.get_experiment_by_name(name)
        if not found.experiment_id:  # an answer without content reads as an empty experiment
            raise ConnectionError("what answers there is not an MLflow server")
        _refuse_if_deleted(found)
        return found.experiment_id

    def send_or_say_why(self, folder):
        """Send one record; returns whether its stage is running, and why the store refused it, if it did.

        A server that is gone raises. One that answers but does not take this record must not block the others.
        """
        for attempt in range(TRIES):
            try:
                return self.send(folder), None
            except Exception as error:
                why = reason(error)
                time.sleep(attempt)  # a database that is locked by others is free again soon
                _refuse_if_deleted(self.client.get_experiment(self.experiment))
        return False, why

    def send(self, folder):
        """Send what the store has not seen of one record, and remember each step; is its stage running?"""
        alive = is_alive(folder)  # asked before reading: a process that has ended writes no more
        events = read_lines(folder / "events.jsonl")
        state = read_sent(folder).get(store_name(self.uri), {"events": 0, "done": False})
        if not events or events[0]["kind"] != "start":
            self._remember(folder, {**state, "done": not alive})  # killed before it began
            return alive
        start = events[0]
        run_id, parent_id = self._find_or_create(folder, start, state.get("run_id"))
        position = state["events"] if run_id == state.get("run_id") else 0  # else that run was deleted
        while position < len(events):
            if alive and events[position]["kind"] == "model":
                break  # its results, which are beside it in MLflow, may be recorded after it
            position += self._send_from(events, position, folder, run_id, parent_id, start)
            self._remember(folder, {"run_id": run_id, "events": position, "done": False})
            _restart_stall_clock()
        if not alive:
            end = events[-1]
            status = end["status"] if end["kind"] == "end" else "KILLED"
            self.client.set_terminated(run_id, status, end_time=_milliseconds(end))
            if parent_id:
                self.client.set_terminated(parent_id, "FINISHED", end_time=_milliseconds(end))
            for run in self._runs_of(folder):  # made by a request that we had given up
                if run.info.run_id != run_id:
                    self.client.delete_run(run.info.run_id)
            for event in events:
                if event["kind"] == "model":  # the store has it; links would keep old weights on the disk
                    shutil.rmtree(folder / event["file"], ignore_errors=True)
            self._remember(folder, {"run_id": run_id, "events": position, "done": True})
        return alive

    def _remember(self, folder, state):
        write_json(folder / "sent.json", {**read_sent(folder), store_name(self.uri): state})

    def _runs_of(self, folder):
        return self._find(f"tags.`offramp.record` = '{folder.name}'")

    def _find_or_create(self, folder, start, remembered):
        found = sorted(self._runs_of(folder), key=lambda run: run.info.run_id != remembered)
        if found:
            return found[0].info.run_id, found[0].data.tags.get("mlflow.parentRunId")
        tags = {"offramp.record": folder.name, "offramp.kind": start["stage"]}
        tags |= {"mlflow.runName": start["name"]}
        parent_id = None
        if start["pipeline"]:
            # One parent per checkout: two machines that look for it at once would both make it.
            key = f"{start['pipeline']}-{self._checkout()}".replace("'", "")
            parent_id = self._parent(start, key)
            tags |= {"pipeline.key": key, "mlflow.parentRunId": parent_id}
        run = self.client.create_run(self.experiment, start_time=_milliseconds(start), tags=tags)
        return run.info.run_id, parent_id

    def _checkout(self):
        path = self.root / CHECKOUT
        if not path.exists():
            write_atomically(path, uuid.uuid4().hex[:8])
        return path.read_text()

    def _parent(self, start, key):
        found = self._find(f"tags.`pipeline.key` = '{key}' and tags.`offramp.kind` = 'pipeline'")
        if found:
            return found[0].info.run_id
        tags = {"mlflow.runName": start["parent"], "pipeline.key": key, "offramp.kind": "pipeline"}
        shared = ("git.", "mlflow.source.git", "machine.", "engine", "resolved.", "dvc.exp", "dvc.baseline")
        tags |= {name: value for name, value in start["tags"].items() if name.startswith(shared)}
        return self.client.create_run(self.experiment, start_time=_milliseconds(start), tags=tags).info.run_id

    def _find(self, condition):
        oldest_first = ["attributes.start_time ASC", "attributes.run_id ASC"]
        return self.client.search_runs([self.experiment], condition, max_results=10, order_by=oldest_first)

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
            self._send_model(event, events, folder, run_id)
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
        if summary_id:  # the evaluation's figures are also on the parent, so that one table compares pipelines
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

    def _send_model(self, event, events, folder, run_id):
        """Log the model as code plus files: nothing is pickled, and it loads where its requirements are.

        In the steps of mlflow.pyfunc.log_model, of which each may be repeated: the whole may not.
        """
        from mlflow.entities import LoggedModelOutput, LoggedModelStatus, Metric
        from mlflow.models import Model

        weights, tokenizer = folder / event["file"], folder / f"{event['file']}.tokenizer"
        if not weights.exists():  # sent to another store before; the original will do if it is still the same
            weights, tokenizer = Path(event["folder"]), Path(event["tokenizer"])
            if not weights.exists() or sha256_of(weights) != event["sha256"]:
                note = "the model was replaced before it could be sent"
                return self.client.set_tag(run_id, _key(f"missing.{event['name']}"), note)
        logged = self._logged_model(event["name"], run_id, events[0]["params"])
        packages = ("torch", "tokenizers", "safetensors", "numpy")
        with tempfile.TemporaryDirectory() as staging:
            small = Path(staging) / "tokenizer"
            small.mkdir()
            for name in ("tokenizer.json", "card.json"):
                if (tokenizer / name).exists():
                    shutil.copy2(tokenizer / name, small / name)
            code = Path(staging) / "stages"
            shutil.copytree(ROOT / "stages", code, ignore=shutil.ignore_patterns("__pycache__"))
            model = Path(staging) / "model"
            self.mlflow.pyfunc.save_model(
                path=str(model),
                mlflow_model=Model(artifact_path=logged.artifact_location, model_uuid=logged.model_id,
                                   run_id=run_id, model_id=logged.model_id),
                python_model=str(code / "tracking/served_model.py"),
                artifacts={"model": str(weights), "tokenizer": str(small)},
                code_paths=[str(code)],
                pip_requirements=[f"{name}=={version(name).split('+')[0]}" for name in packages],
                signature=_signature(),
            )
            self.client.log_model_artifacts(logged.model_id, str(model))
        self.client.finalize_logged_model(logged.model_id, LoggedModelStatus.READY)
        outputs = self.client.get_run(run_id).outputs
        if logged.model_id not in [output.model_id for output in outputs.model_outputs]:
            self.client.log_outputs(run_id, [LoggedModelOutput(logged.model_id, step=0)])
        results = [Metric(_key(name), value, _milliseconds(each), 0, model_id=logged.model_id, run_id=run_id)
                   for each in events if each["kind"] == "metrics" and each["step"] is None
                   for name, value in each["values"].items()]
        for first in range(0, len(results), BATCH):  # models compare by them in MLflow's table of models
            self.client.log_batch(run_id, metrics=results[first:first + BATCH])

    def _logged_model(self, name, run_id, params):
        """The model of this run with this name, made where it is not there yet."""
        condition = f"name = '{name}' and source_run_id = '{run_id}'"
        found = self.client.search_logged_models([self.experiment], condition)
        if not found:
            return self.client.create_logged_model(self.experiment, name, run_id, params=params)
        kept, *others = sorted(found, key=lambda model: model.model_id)
        for model in others:  # made by a request that we had given up
            self.client.delete_logged_model(model.model_id)
        return kept


def _refuse_if_deleted(experiment):
    if experiment.lifecycle_stage == "deleted":
        raise Refusal(
            f"the experiment {experiment.name} was deleted in MLflow: mlflow experiments restore --experiment-id"
            f" {experiment.experiment_id}, or set MLFLOW_EXPERIMENT_NAME=other")


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
