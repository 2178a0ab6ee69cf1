"""The record of a run survives what befalls the tracker, and reaches MLflow complete and once."""

import http.server
import json
import os
import shutil
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
from test_served_model import save_tiny_student

from chaos.commands import free_port
from stages.files.artifacts import ROOT, sha256_of
from stages.tracking import identity, mirror, records, redaction, servers
from stages.tracking import record as tracking
from stages.training import launch as launching

mlflow = pytest.importorskip("mlflow")
SECRET = "hunter2"


@pytest.fixture(autouse=True)
def alone(monkeypatch):
    """No store, experiment or DVC from outside."""
    for name in ("MLFLOW_TRACKING_URI", "MLFLOW_EXPERIMENT_NAME", "DVC_STAGE", "DVC_ROOT", "DVC_EXP_NAME"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("MLFLOW_DISABLE_TELEMETRY", "true")


@pytest.fixture
def no_mirror(monkeypatch):
    monkeypatch.setattr(tracking, "_start_mirror", lambda folder, store: None)


@pytest.fixture(scope="session")
def empty_store(tmp_path_factory):
    """A store with its tables made, which takes MLflow seconds."""
    path = tmp_path_factory.mktemp("store") / "mlflow.db"
    mlflow.MlflowClient(f"sqlite:///{path}").search_experiments()
    return path


@pytest.fixture
def made(tmp_path, empty_store):
    """A root whose store is made already."""
    shutil.copy(empty_store, tmp_path / "mlflow.db")
    return tmp_path


def record(root, stage="distill", out=None, sweep=None):
    """A stage that says something of every kind; returns its folder."""
    (root / "picture.svg").write_text("<svg/>")
    settings = {"seed": 1, stage: {"temperature": 2.0}, "corpus": {"path": f"https://me:{SECRET}@host/data"}}
    with tracking.start_run(stage, settings, out or root, root, sweep) as run:
        for step in range(700):
            run.metrics({"loss": 5.0 - step / 700, "grad_norm": 1.0}, step=step)
        run.metrics({"bits_per_byte": 1.75, "note": "not a number"})
        run.text("samples.txt", "def main(): pass")
        run.artifact(root / "picture.svg")
        run.tag("engine", "gloo x 2")
    return run.folder


def sync(root, *words, **environment):
    return subprocess.run(
        [sys.executable, "-m", "stages.tracking", "sync", "--root", str(root), *map(str, words)],
        cwd=ROOT, env={**os.environ, **environment}, capture_output=True, text=True, timeout=120,
    )


def runs_in(root):
    client = mlflow.MlflowClient(f"sqlite:///{root}/mlflow.db")
    experiment = client.get_experiment_by_name("offramp")
    runs = client.search_runs([experiment.experiment_id], max_results=100)
    return client, {run.data.tags["offramp.kind"]: run for run in runs}, runs


def test_a_name_that_is_not_utf8_loses_no_event(tmp_path, no_mirror):
    settings = {"corpus": {"paths": ["texts/caf\udce9.txt"]}}
    with tracking.start_run("prepare", settings, tmp_path, tmp_path):
        pass
    (folder,) = (tmp_path / records.RECORDS).iterdir()
    start = records.read_lines(folder / "events.jsonl")[0]
    assert start["kind"] == "start" and "texts/caf" in start["params"]["corpus.paths"]


def test_a_run_reaches_the_local_store_whole_and_a_second_sync_adds_nothing(tmp_path, no_mirror):
    folder = record(tmp_path)
    first = sync(tmp_path)
    assert first.returncode == 0, first.stderr
    client, by_kind, runs = runs_in(tmp_path)
    child, parent = by_kind["distill"], by_kind["pipeline"]
    assert len(runs) == 2
    assert child.info.status == "FINISHED" and child.info.run_name == "distill"
    assert child.data.tags["mlflow.parentRunId"] == parent.info.run_id
    assert child.data.params["distill.temperature"] == "2.0"
    assert child.data.tags["engine"] == "gloo x 2" and "machine.cores" in child.data.tags
    assert child.data.metrics["bits_per_byte"] == 1.75 and "note" not in child.data.metrics
    curve = client.get_metric_history(child.info.run_id, "loss")
    assert [point.step for point in curve] == list(range(700))
    names = {item.path for item in client.list_artifacts(child.info.run_id)}
    assert names == {"settings.yaml", "samples.txt", "picture.svg"}

    (folder / "sent.json").unlink()  # as if killed between sending and remembering
    assert mirror.send(tmp_path) == 0
    client, _, runs = runs_in(tmp_path)
    assert len(runs) == 2
    assert len(client.get_metric_history(child.info.run_id, "loss")) == 700
    assert sync(tmp_path).stdout == "everything is sent\n"


def test_stages_of_one_pipeline_share_a_parent_and_a_run_by_hand_has_none(made, no_mirror):
    record(made, "pretrain")
    record(made, "evaluate")
    (made / "outputs").mkdir()
    record(made, "sparsify", out=made / "outputs")
    assert mirror.send(made) == 0
    _, by_kind, runs = runs_in(made)
    assert len(runs) == 4
    parent = by_kind["pipeline"]
    assert by_kind["pretrain"].data.tags["mlflow.parentRunId"] == parent.info.run_id
    assert by_kind["evaluate"].data.tags["mlflow.parentRunId"] == parent.info.run_id
    assert "mlflow.parentRunId" not in by_kind["sparsify"].data.tags
    assert parent.data.metrics == {"bits_per_byte": 1.75}  # of evaluate, so that pipelines compare


def test_jobs_of_a_sweep_stand_under_one_parent_named_by_their_overrides(made, no_mirror):
    sweep = made / "multirun/distill/20260101"
    for job, temperature in enumerate((1, 2)):
        (sweep / f"{job}/.hydra").mkdir(parents=True)
        (sweep / f"{job}/.hydra/overrides.yaml").write_text(f"- distill.temperature={temperature}\n")
        record(made, out=sweep / str(job), sweep=sweep)
    assert mirror.send(made) == 0
    _, _, runs = runs_in(made)
    assert {run.info.run_name for run in runs} == {
        "sweep distill 20260101", "distill temperature=1", "distill temperature=2"}


def test_a_run_by_hand_is_named_by_its_overrides(made, no_mirror):
    out = made / "outputs/distill/20260101"
    (out / ".hydra").mkdir(parents=True)
    (out / ".hydra/overrides.yaml").write_text("- distill.steps=4\n- seed=2\n")
    start = records.read_lines(record(made, out=out) / "events.jsonl")[0]
    assert start["name"] == "distill steps=4 seed=2" and start["pipeline"] is None


def test_figures_of_steps_reach_the_record_while_they_are_written_and_once_each(tmp_path, no_mirror, monkeypatch):
    monkeypatch.setattr(launching, "TAIL_S", 0.01)
    figures = {"teacher/loss": 5.0, "teacher/tokens_per_second": 9}
    rows = [{"step": step, "time": 100.0 + step, "figures": figures}
            for step in range(6)]
    path = tmp_path / "steps.jsonl"

    def recorded():
        events = records.read_lines(run.folder / "events.jsonl")
        return [(event["step"], event["time"]) for event in events if event["kind"] == "metrics"]

    def soon(steps):
        deadline = time.monotonic() + 20
        while recorded() != [(step, 100.0 + step) for step in steps] and time.monotonic() < deadline:
            time.sleep(0.01)
        return recorded() == [(step, 100.0 + step) for step in steps]

    with tracking.start_run("pretrain", {}, tmp_path, tmp_path) as run, path.open("a") as file:
        with launching._record_steps(path, run) as speeds:
            for row in rows[:2]:
                file.write(json.dumps(row) + "\n")
            half = json.dumps(rows[2])
            file.write(half[:9])
            file.flush()
            assert soon([0, 1])
            file.write(half[9:] + "\n")
            file.write('{"step": 3, "ti' + json.dumps(rows[3]) + "\n")  # a full disk cut the line before short
            file.flush()
            assert soon([0, 1, 2])
            file.write("".join(json.dumps(row) + "\n" for row in rows[4:]))
            file.flush()
        assert soon([0, 1, 2, 4, 5]) and speeds == {"teacher/tokens_per_second": 9}


@pytest.mark.parametrize("corpus, name", [
    ({"source": "stdlib", "name": "the standard library of Python 3.11.7", "python": "3.11.7"}, "stdlib 3.11.7"),
    ({"source": "files", "name": "80 files", "files": ["a.txt"] * 80}, "80 files"),
    ({"source": "huggingface", "name": "wikitext", "subset": "raw"}, "wikitext raw"),
    ("stdlib", "stdlib"), (None, "corpus")])
def test_the_dataset_column_shows_a_short_name_and_the_digest_of_the_card(tmp_path, corpus, name):
    card = tmp_path / "artifacts/data/card.json"
    card.parent.mkdir(parents=True)
    card.write_text(json.dumps({"corpus": corpus, "splits": {}}))
    assert identity.dataset(tmp_path) == {"name": name, "digest": sha256_of(card)[:32], "profile": {}}


def test_a_model_of_a_running_stage_waits_for_all_of_its_results(made, no_mirror):
    (made / "student").mkdir()
    (made / "student/model.safetensors").write_bytes(b"weights")
    with tracking.start_run("distill", {}, made, made) as run:
        run.metrics({"loss": 3.0}, step=1)
        run.model(made / "student")
        run.metrics({"seconds": 2.0})
        assert mirror.send(made) == 0
        assert runs_in(made)[1]["distill"].data.metrics == {"loss": 3.0}
    assert mirror.send(made) == 0
    client, by_kind, _ = runs_in(made)
    model, = client.search_logged_models([by_kind["distill"].info.experiment_id])
    assert {metric.key: metric.value for metric in model.metrics} == {"seconds": 2.0}


def test_an_unreachable_server_does_not_raise_and_nothing_is_lost(made, monkeypatch, capfd):
    nowhere = f"127.0.0.1:{free_port()}"  # where nothing listens
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"http://me:{SECRET}@{nowhere}")
    folder = record(made)
    waited, deadline = "", time.monotonic() + 60
    while "sync" not in waited and time.monotonic() < deadline:
        time.sleep(0.2)
        waited += capfd.readouterr().err
    assert "the run is kept" in waited and "python -m stages.tracking sync" in waited
    assert SECRET not in waited
    assert len(records.read_lines(folder / "events.jsonl")) > 700
    monkeypatch.delenv("MLFLOW_TRACKING_URI")
    assert mirror.send(made) == 0  # later, to a store that is there
    assert len(runs_in(made)[2]) == 2


@pytest.mark.parametrize("uri, told", [
    ("127.0.0.1:5000", "has no scheme: write http://127.0.0.1:5000"),
    ("localhost:5000/mlflow", "has no scheme: write http://localhost:5000/mlflow"),
    (f"me:{SECRET}@host:5000", "has no scheme: write http://***@host:5000"),
    ("file:///data/mlruns", "set MLFLOW_TRACKING_URI=sqlite:///mlflow.db, or a server's address such as http://"),
    ("file:mlruns", "set MLFLOW_TRACKING_URI=sqlite:///mlflow.db"),
    ("./mlruns", "set MLFLOW_TRACKING_URI=sqlite:///mlflow.db"),
    ("mlflow.example.com", "a server's address such as http://127.0.0.1:5000"),
])
def test_a_uri_that_mlflow_takes_for_a_folder_is_told_with_what_to_write_instead(
        uri, told, made, no_mirror, monkeypatch, capsys):
    record(made)
    monkeypatch.setenv("MLFLOW_TRACKING_URI", uri)
    assert mirror.send(made) == 1
    line, = capsys.readouterr().err.splitlines()
    assert told in line and SECRET not in line and "python -m stages.tracking sync" in line
    assert len(records.unsent(made)) == 1


@pytest.mark.parametrize("status, body, told", [
    (401, b"You are not authenticated.", "refused the user name or password: set MLFLOW_TRACKING_USERNAME and"),
    (401, b'{"error_code": "UNAUTHENTICATED"}', "refused the user name or password: set MLFLOW_TRACKING_USERNAME and"),
    (403, b"Permission denied", "does not let this user write there (403): ask"),
    (403, b'{"error_code": "PERMISSION_DENIED"}', "does not let this user write there (403): ask"),
])
def test_a_server_that_refuses_the_user_is_not_called_unreachable(
        status, body, told, made, no_mirror, monkeypatch, capsys):
    class Refusing(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            self.send_response(status)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *_):
            pass

    record(made)
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Refusing) as refusing:
        threading.Thread(target=refusing.serve_forever, daemon=True).start()
        monkeypatch.setenv("MLFLOW_TRACKING_URI", f"http://127.0.0.1:{refusing.server_port}")
        assert mirror.send(made) == 1
        refusing.shutdown()
    line, = capsys.readouterr().err.splitlines()
    assert told in line and "not reached" not in line


@pytest.mark.parametrize("variable", ["http_proxy", "HTTP_PROXY", "all_proxy"])
def test_a_proxy_in_the_way_is_named_with_how_to_go_around_it(variable, made, no_mirror, monkeypatch, capsys):
    for name in ("http_proxy", "HTTP_PROXY", "all_proxy", "ALL_PROXY", "no_proxy", "NO_PROXY"):
        monkeypatch.delenv(name, raising=False)
    record(made)
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://localhost:5999")
    monkeypatch.setenv(variable, f"http://me:{SECRET}@127.0.0.1:9")
    assert mirror.send(made) == 1
    line, = capsys.readouterr().err.splitlines()
    assert f"the proxy that {variable} names" in line and "set NO_PROXY=localhost" in line and SECRET not in line
    monkeypatch.setenv("NO_PROXY", "localhost")
    assert mirror.send(made) == 1
    assert "proxy" not in capsys.readouterr().err


def test_a_deleted_experiment_is_restored_by_the_command_that_is_told(made, no_mirror, monkeypatch, capsys):
    record(made)
    assert mirror.send(made) == 0
    client = mlflow.MlflowClient(f"sqlite:///{made}/mlflow.db")
    identity = client.get_experiment_by_name("offramp").experiment_id
    client.delete_experiment(identity)
    record(made)
    capsys.readouterr()
    assert mirror.send(made) == 1
    line, = capsys.readouterr().err.splitlines()
    command = f"mlflow experiments restore --experiment-id {identity}"
    assert f"{command}, or set MLFLOW_EXPERIMENT_NAME=other" in line
    mlflow_itself, *words = command.split()
    subprocess.run([Path(sys.executable).with_name(mlflow_itself), *words], cwd=made, check=True, capture_output=True)
    assert mirror.send(made) == 0 and records.unsent(made) == []

    client.delete_experiment(identity)
    record(made)
    monkeypatch.setenv("MLFLOW_EXPERIMENT_NAME", "other")
    assert mirror.send(made) == 0 and records.unsent(made) == []


def test_a_message_is_cut_between_words_and_a_secret_in_it_never(monkeypatch):
    monkeypatch.setenv("A_TOKEN", "abcdefgh-ijkl")
    line = redaction.redacted_line("word " * 10 + "abcdefgh-ijkl word", 56)
    assert line == "word " * 10 + "*** …"
    assert servers.reason(ValueError("some words " * 100)).endswith("words …")


def test_the_mirror_that_a_stage_starts_fills_the_store(made):
    record(made)  # by hand on the local store: the stage waits for its mirror
    sync(made)  # or this waits for it, where the machine is slow
    assert len(runs_in(made)[2]) == 2


def test_a_killed_stage_is_sent_as_killed_with_what_it_had_said(made):
    script = (
        "import sys, os, signal; from pathlib import Path; from stages.tracking.record import start_run\n"
        "root = Path(sys.argv[1])\n"
        "with start_run('distill', {'seed': 1}, root, root) as run:\n"
        "    run.metrics({'loss': 3.0}, step=1)\n"
        "    os.kill(os.getpid(), signal.SIGKILL)\n"
    )
    subprocess.run([sys.executable, "-c", script, str(made)], cwd=ROOT, timeout=60)
    folder = records.unsent(made)[0]
    with open(folder / "events.jsonl", "a") as file:
        file.write('{"kind": "metrics", "values": {"lo')  # and a line cut short
    assert mirror.send(made) == 0
    child = runs_in(made)[1]["distill"]
    assert child.info.status == "KILLED" and child.data.metrics == {"loss": 3.0}
    assert records.unsent(made) == []


def test_a_failing_stage_is_recorded_as_failed_and_its_error_goes_through(tmp_path, no_mirror):
    with pytest.raises(ValueError, match="the stage's own"):
        with tracking.start_run("distill", {}, tmp_path, tmp_path) as run:
            raise ValueError("the stage's own")
    events = records.read_lines(run.folder / "events.jsonl")
    assert events[-1]["status"] == "FAILED" and any("the stage's own" in str(event) for event in events)


def test_a_record_that_cannot_be_written_leaves_the_stage_alone(tmp_path, capsys, no_mirror):
    (tmp_path / ".runs").write_text("a file where the folder should be")
    with tracking.start_run("distill", {}, tmp_path, tmp_path) as run:
        run.metrics({"loss": 1.0}, step=0)
        run.artifact(tmp_path / "missing")
        run.model(tmp_path / "missing")
        run.text("samples.txt", "text")
    assert capsys.readouterr().err.count("not recorded") == 1


def test_secrets_never_reach_the_record(tmp_path, no_mirror):
    folder = record(tmp_path)
    said = (folder / "events.jsonl").read_text()
    assert SECRET not in said and "https://***@host/data" in said
    database = redaction.redacted("postgresql://u:p@ss@host/db?password=x&a=1")
    assert database == "postgresql://***@host/db?password=***&a=1"
    flat = redaction.flat({"store": {"api_key": "x", "end_of_text": 3}})
    assert flat == {"store.api_key": "***", "store.end_of_text": 3}


def test_mirrors_at_once_on_one_new_store_lose_nothing(tmp_path, no_mirror):
    folders = [record(tmp_path) for _ in range(2)]
    words = [sys.executable, "-m", "stages.tracking", "sync", "--root", str(tmp_path)]
    processes = [subprocess.Popen([*words, str(folder)], cwd=ROOT) for folder in folders]
    assert [process.wait(120) for process in processes] == [0, 0]
    client, _, runs = runs_in(tmp_path)
    children = [run for run in runs if run.data.tags["offramp.kind"] == "distill"]
    assert len(children) == 2 and len(runs) == 3
    assert all(len(client.get_metric_history(run.info.run_id, "loss")) == 700 for run in children)


def test_the_logged_model_generates_the_text_that_the_saved_one_does(made, no_mirror, monkeypatch):
    from stages.data import shards
    from stages.model import generation
    from stages.model import hub as models

    tokenizer = shards.BytesTokenizer()
    folder = made / "artifacts/student"
    save_tiny_student(made, folder)
    with tracking.start_run("distill", {"seed": 1}, made, made) as run:
        run.model(folder)
    links = run.folder / "files"
    weights = folder / "model.safetensors"
    assert any(os.path.samefile(weights, path) for path in links.rglob("model.safetensors"))
    expected = tokenizer.decode(generation.generate(
        models.load(folder), tokenizer.encode("def "), 12, end_of_text=tokenizer.end_of_text))
    shutil.rmtree(folder)  # as DVC does before the stage runs again
    assert mirror.send(made) == 0

    client, by_kind, _ = runs_in(made)
    logged = client.search_logged_models([by_kind["distill"].info.experiment_id])
    assert [model.name for model in logged] == ["student"]
    assert by_kind["distill"].info.status == "FINISHED"
    assert not any(links.rglob("model.safetensors"))  # sent, so no longer kept
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{made}/mlflow.db")
    mlflow.set_tracking_uri(f"sqlite:///{made}/mlflow.db")
    served = mlflow.pyfunc.load_model(f"models:/{logged[0].model_id}")
    assert served.predict(["def "], params={"new_tokens": 12}) == [expected]
    assert not list((made / "mlartifacts").rglob("*.pkl"))


def test_stage_imports_of_tracking_stay_free_of_mlflow_and_torch():
    script = "import sys, stages.tracking; print(*({'mlflow', 'torch', 'pandas'} & set(sys.modules)))"
    assert subprocess.check_output([sys.executable, "-c", script], cwd=ROOT, text=True).strip() == ""


def test_data_that_dvc_yaml_names_is_recorded_by_its_hash(made, no_mirror):
    data = made / "artifacts/data"
    data.mkdir(parents=True)
    card = {"corpus": "stdlib", "splits": {"train": {"documents": 2, "tokens": 9, "shards": []}}}
    (data / "card.json").write_text(json.dumps(card))
    (made / "dvc.yaml").write_text(
        "stages:\n  distill:\n    deps: [stages/distill.py, artifacts/data]\n    outs: [artifacts/student]\n"
        "    metrics: [metrics/distill.json: {cache: false}]\n")
    (made / "metrics").mkdir()
    (made / "metrics/distill.json").write_text("{}")
    record(made)
    assert mirror.send(made) == 0
    child = runs_in(made)[1]["distill"]
    assert {"in.artifacts/data", "out.metrics/distill.json"} <= set(child.data.tags)
    assert child.inputs.dataset_inputs[0].dataset.name == "stdlib"
    assert Path(data / "card.json").exists()
