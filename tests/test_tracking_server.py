"""A real MLflow server, and what may befall it or the mirror: what arrives is complete and there once.

Faults are put between mirror and server by a relay that sees each request: it can lose a request or its
answer, delay, stay mute, or kill either end. Nothing here is timed.
"""

import contextlib
import hashlib
import http.server
import json
import os
import re
import select
import shutil
import signal
import socket
import socketserver
import sqlite3
import subprocess
import sys
import threading
import time
from pathlib import Path

import psutil
import pytest

from chaos.commands import free_port
from stages.data import shards
from stages.files.artifacts import ROOT, sha256_of
from stages.model import hub as models
from stages.model.families.qwen3.model import Qwen3Shape as StudentShape
from stages.tracking import mirror, records, store
from stages.tracking import record as tracking

mlflow = pytest.importorskip("mlflow")
STEPS = 300  # of two numbers: more than one batch
REQUEST = re.compile(rb"(GET|POST|PUT|PATCH|DELETE) (\S+) HTTP/1\.1\r\n")


def wait_until(condition, seconds=120):
    deadline = time.monotonic() + seconds
    while not (found := condition()):
        assert time.monotonic() < deadline, "waited in vain"
        time.sleep(0.1)
    return found


class Server:
    """The server of `make ui`, its SQLite file and artifacts in a folder of the test."""

    def __init__(self, folder):
        self.folder, self.port = folder, free_port()
        self.uri = f"http://127.0.0.1:{self.port}"
        recipe = subprocess.check_output(["make", "-n", "ui", f"PORT={self.port}"], cwd=ROOT, text=True)
        self.command = recipe[recipe.index("MLFLOW_SERVER"):]
        self.start()

    def start(self):
        path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
        self.process = subprocess.Popen(
            self.command, shell=True, cwd=self.folder, env={**os.environ, "PATH": path}, start_new_session=True,
            stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        wait_until(self.answers)

    def answers(self):
        with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", self.port), 1):
            return True
        assert self.process.poll() is None, "the server ended"

    def processes(self):
        found = []
        for process in psutil.process_iter():
            with contextlib.suppress(psutil.Error, ProcessLookupError):
                if os.getsid(process.pid) == self.process.pid and process.status() != psutil.STATUS_ZOMBIE:
                    found.append(process)
        return found

    def kill(self):
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait(30)
        wait_until(lambda: not self.processes())


class Relay(socketserver.ThreadingTCPServer):
    """Passes TCP on to the server; `verdict(number, method and path)` decides about each request.

    It may say "lose" (the server never sees it), "mute" (the server does it, the answer is lost) or "hold"
    (nobody is ever answered). `delay` seconds pass before each answer.
    """

    daemon_threads, block_on_close = True, False
    request_queue_size = 64

    def __init__(self, target_port):
        super().__init__(("127.0.0.1", 0), None)
        self.target_port = target_port
        self.uri = f"http://127.0.0.1:{self.server_address[1]}"
        self.reset()
        threading.Thread(target=self.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True).start()

    def reset(self, verdict=lambda number, what: None, delay=0.0):
        self.verdict, self.delay, self.count, self.seen, self.release = verdict, delay, 0, [], threading.Event()

    def finish_request(self, client, address):
        try:
            with socket.create_connection(("127.0.0.1", self.target_port)) as server:
                for end in (client, server):  # or Nagle's algorithm adds 40 ms to each request
                    end.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
                self.pass_on(client, server)
        except OSError:
            pass  # one end is gone: so is the connection

    def pass_on(self, client, server):
        said = None
        while True:
            for source in select.select([client, server], [], [])[0]:
                chunk = source.recv(1 << 16)
                if not chunk:
                    return
                if source is server:
                    if said == "mute":
                        return
                    time.sleep(self.delay)
                    client.sendall(chunk)
                    continue
                if request := REQUEST.match(chunk):  # the client waits for each answer: a request starts a chunk
                    self.count += 1
                    self.seen.append(f"{request[1].decode()} {request[2].decode()}")
                    said = self.verdict(self.count, self.seen[-1])
                if said == "lose":
                    return
                if said == "hold":
                    self.release.wait()
                    return
                server.sendall(chunk)


def from_request(first, verdict):
    """The server dies at this request: it and all later ones fail."""
    return lambda number, what: "lose" if number > first else verdict if number == first else None


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    server = Server(tmp_path_factory.mktemp("server"))
    yield server
    server.kill()


@pytest.fixture(scope="module")
def relay(server):
    with Relay(server.port) as relay:
        yield relay
        relay.shutdown()


@pytest.fixture(autouse=True)
def alone(monkeypatch, tmp_path, request):
    """Nothing from outside, an experiment of its own, and at the end no process that works on this folder."""
    for name in ("DVC_STAGE", "DVC_ROOT", "DVC_EXP_NAME", "MLFLOW_TRACKING_URI"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("MLFLOW_EXPERIMENT_NAME", request.node.name)
    monkeypatch.setenv("MLFLOW_DISABLE_TELEMETRY", "true")
    yield
    wait_until(lambda: not mirrors_of(tmp_path))


def mirrors_of(root):
    found = []
    for process in psutil.process_iter():
        with contextlib.suppress(psutil.Error):
            if any(str(root) in word for word in process.cmdline()):
                found.append(process)
    return found


def say_all(run, folder):
    for step in range(STEPS):
        run.metrics({"loss": 5.0 - step / STEPS, "grad_norm": 1.0}, step=step)
    run.metrics({"bits_per_byte": 1.75, "nothing": float("nan")})
    run.text("samples.txt", "def main(): pass")
    (folder / "picture.svg").write_text("<svg/>")
    run.artifact(folder / "picture.svg")
    run.tag("engine", "gloo x 2")


@pytest.fixture(scope="module")
def recorded(tmp_path_factory):
    """Two roots, each with the record of one stage: `plain` without and `model` with a model."""
    made = {}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tracking, "_start_mirror", lambda folder, store: None)
        for name in ("plain", "model"):
            root = made[name] = tmp_path_factory.mktemp(name)
            data = root / "artifacts/data"
            data.mkdir(parents=True)
            tokenizer = shards.BytesTokenizer()
            (data / "tokenizer.json").write_text(tokenizer.to_json())
            shards.write_card(data, {
                "tokenizer": "bytes", "tokenizer_sha256": sha256_of(data / "tokenizer.json"), "corpus": "stdlib",
                "vocab_size": tokenizer.vocab_size, "end_of_text": tokenizer.end_of_text,
                "splits": {"train": {"documents": 2, "tokens": 9, "shards": []}}})
            (root / "dvc.yaml").write_text("stages: {evaluate: {deps: [artifacts/data]}, distill: {}}")
            with tracking.start_run("evaluate", {"seed": 1}, root, root) as run:
                if name == "model":
                    shape = StudentShape(
                        vocab_size=tokenizer.vocab_size, sequence_tokens=64, layers=1, width=16, heads=2, kv_heads=1,
                        head_dim=8, mlp_width=16, rope_theta=10000.0)
                    models.save(models.new_model(shape, seed=1), root / "student")
                    run.metrics({"bits_per_byte": 1.75})
                    run.model(root / "student", data)
                else:
                    say_all(run, root)
    return made


def copy_of(root, to):
    """The record with nothing sent of it, in a checkout that is always the same one."""
    shutil.copytree(root / ".runs", to / ".runs")
    (to / store.CHECKOUT).write_text("tested")
    return to


def contents(server, experiment):
    """All that the experiment holds, by the server's own API, with ids replaced by what they stand for."""
    client = mlflow.MlflowClient(server.uri)
    identity = client.get_experiment_by_name(experiment).experiment_id
    runs = client.search_runs([identity], max_results=1000)
    kinds = {run.info.run_id: run.data.tags["offramp.kind"] for run in runs}
    logged = {model.model_id: model for model in client.search_logged_models([identity])}
    stored = server.folder / "mlartifacts" / identity
    found = []
    for run in runs:
        run_id, tags = run.info.run_id, dict(run.data.tags)
        if parent := tags.pop("mlflow.parentRunId", None):
            tags["parent"] = kinds[parent]
        metrics = {key: [(point.step, point.timestamp, repr(point.value))
                         for point in client.get_metric_history(run_id, key)] for key in run.data.metrics}
        found.append({
            "name": run.info.run_name, "status": run.info.status, "end": run.info.end_time,
            "start": run.info.start_time, "tags": tags, "params": run.data.params, "metrics": metrics,
            "files": hashes(stored / run_id / "artifacts"),
            "data": [entry.dataset.digest for entry in run.inputs.dataset_inputs],
            "models": [logged[output.model_id].name for output in run.outputs.model_outputs],
        })
    found += [{"name": model.name, "status": str(model.status), "params": model.params,
               "metrics": {metric.key: metric.value for metric in model.metrics or []},
               "files": hashes(stored / "models" / model.model_id / "artifacts")} for model in logged.values()]
    return sorted(found, key=lambda entry: (entry["name"], len(entry)))


def hashes(folder):
    named_by_time = ("MLmodel",)  # holds its ids and the hour of its making
    return {str(path.relative_to(folder)): path.name if path.name in named_by_time else sha256_of(path)
            for path in folder.rglob("*") if path.is_file()}


@pytest.fixture(scope="module")
def whole(server, relay, recorded, tmp_path_factory):
    """What an uninterrupted send leaves on the server, and the requests it took."""
    wanted = {}
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MLFLOW_TRACKING_URI", relay.uri)
        for name, root in recorded.items():
            patch.setenv("MLFLOW_EXPERIMENT_NAME", f"whole {name}")
            relay.reset()
            assert mirror.send(copy_of(root, tmp_path_factory.mktemp("whole")), quiet=True) == 0
            wanted[name] = contents(server, f"whole {name}"), relay.seen
    relay.reset()
    return wanted


def test_a_run_goes_over_http_whole(whole):
    child, parent = whole["plain"][0]
    assert (child["name"], child["status"], child["tags"]["parent"]) == ("evaluate", "FINISHED", "pipeline")
    assert child["params"] == {"seed": "1"} and child["tags"]["engine"] == "gloo x 2"
    assert [point[0] for point in child["metrics"]["loss"]] == list(range(STEPS))
    assert child["metrics"]["nothing"][0][2] == "nan" and len(child["data"]) == 1
    assert set(child["files"]) == {"settings.yaml", "samples.txt", "picture.svg"}
    assert child["files"]["picture.svg"] == hashlib.sha256(b"<svg/>").hexdigest()
    assert set(parent["metrics"]) == {"bits_per_byte", "nothing"}

    child, parent, model = whole["model"][0]
    assert child["models"] == ["student"] and model["status"] == "READY"
    assert model["metrics"] == {"bits_per_byte": 1.75}
    assert {"MLmodel", "artifacts/student/model.safetensors", "code/stages/tracking/served_model.py"} <= {
        re.sub(r"artifacts/\d-", "artifacts/", name) for name in model["files"]}


@pytest.mark.parametrize("verdict", ["lose", "mute"])
def test_a_server_that_dies_at_any_request_costs_nothing_and_doubles_nothing(
        verdict, server, relay, recorded, whole, tmp_path, monkeypatch, capsys):
    wanted, requests = whole["plain"]
    monkeypatch.setenv("MLFLOW_TRACKING_URI", relay.uri)
    for number in range(1, len(requests) + 1):
        experiment = f"{verdict} {number}"
        monkeypatch.setenv("MLFLOW_EXPERIMENT_NAME", experiment)
        root = copy_of(recorded["plain"], tmp_path / str(number))
        relay.reset(from_request(number, verdict))
        assert mirror.send(root, quiet=True) == 1
        assert "was not reached" in capsys.readouterr().err
        relay.reset()
        assert mirror.send(root, quiet=True) == 0
        assert contents(server, experiment) == wanted, requests[number - 1]


@pytest.mark.parametrize("verdict", ["lose", "mute"])
@pytest.mark.parametrize("request_", ["POST .*logged-models$", "PUT .*model.safetensors", "PATCH .*logged-models/",
                                      "POST .*outputs"])
def test_a_model_half_sent_becomes_one_model(
        request_, verdict, server, relay, recorded, whole, tmp_path, monkeypatch, request):
    monkeypatch.setenv("MLFLOW_TRACKING_URI", relay.uri)
    wanted, requests = whole["model"]
    number = next(i for i, seen in enumerate(requests, 1) if re.match(request_, seen))
    root = copy_of(recorded["model"], tmp_path)
    relay.reset(from_request(number, verdict))
    assert mirror.send(root, quiet=True) == 1
    relay.reset()
    assert mirror.send(root, quiet=True) == 0
    assert contents(server, request.node.name) == wanted
    assert not list(root.rglob("model.safetensors"))  # the record lets go of what the store has


def test_one_lost_answer_in_passing_is_mended_at_once(server, relay, recorded, whole, tmp_path, monkeypatch, request):
    monkeypatch.setenv("MLFLOW_TRACKING_URI", relay.uri)
    root = copy_of(recorded["plain"], tmp_path)
    created = next(i for i, seen in enumerate(whole["plain"][1], 1) if "runs/create" in seen)
    relay.reset(lambda number, what: "mute" if number == created else None)
    assert mirror.send(root, quiet=True) == 0
    assert contents(server, request.node.name) == whole["plain"][0]


def test_a_server_too_slow_to_be_heard_is_given_up_and_gets_the_rest_later(
        server, relay, recorded, whole, tmp_path, monkeypatch, request):
    monkeypatch.setenv("MLFLOW_TRACKING_URI", relay.uri)
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_TIMEOUT", "1")
    root = copy_of(recorded["plain"], tmp_path)
    for first in (4, 7):  # it does what it is asked, and answers when nobody listens any more
        relay.reset(lambda number, what, first=first: setattr(relay, "delay", 2.0 if number >= first else 0.0))
        assert mirror.send(root, quiet=True) == 1
        assert relay.count < first + 5
    monkeypatch.delenv("MLFLOW_HTTP_REQUEST_TIMEOUT")
    relay.reset()
    assert mirror.send(root, quiet=True) == 0
    assert contents(server, request.node.name) == whole["plain"][0]


def test_a_server_that_answers_with_nothing_is_told_at_the_first_answer(recorded, tmp_path, monkeypatch, capfd):
    answered = []

    class Hollow(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            answered.append(self.path)
            self.send_response(200)
            self.end_headers()

        do_POST = do_GET

        def log_message(self, *_):
            pass

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Hollow) as hollow:
        threading.Thread(target=hollow.serve_forever, daemon=True).start()
        monkeypatch.setenv("MLFLOW_TRACKING_URI", f"http://127.0.0.1:{hollow.server_port}")
        assert mirror.send(copy_of(recorded["plain"], tmp_path)) == 1
        hollow.shutdown()
    assert "what answers there is not an MLflow server" in capfd.readouterr().err and len(answered) == 1


def test_the_server_killed_in_the_middle_is_started_again_and_has_all(
        server, relay, recorded, whole, tmp_path, monkeypatch, request):
    monkeypatch.setenv("MLFLOW_TRACKING_URI", relay.uri)
    root = copy_of(recorded["plain"], tmp_path)
    relay.reset(lambda number, what: server.kill() if number == 8 else None)
    try:
        assert mirror.send(root, quiet=True) == 1
    finally:
        server.start()
    relay.reset()
    assert mirror.send(root, quiet=True) == 0
    assert contents(server, request.node.name) == whole["plain"][0]


def mirror_process(root, **environment):
    words = [sys.executable, "-m", "stages.tracking", "sync", "--root", str(root)]
    return subprocess.Popen(words, cwd=ROOT, env={**os.environ, **environment}, text=True,
                            stdout=subprocess.PIPE, stderr=subprocess.PIPE)


def test_a_mirror_killed_again_and_again_leaves_it_to_the_next(
        server, relay, recorded, whole, tmp_path, monkeypatch, request):
    monkeypatch.setenv("MLFLOW_TRACKING_URI", relay.uri)
    root = copy_of(recorded["plain"], tmp_path)
    for number, verdict in ((4, "mute"), (5, "mute"), (6, "lose")):
        running = []

        def kill(count, what, number=number, verdict=verdict, running=running):
            if count == number:
                running[0].kill()
                return verdict

        relay.reset(kill)
        running.append(mirror_process(root))
        running[0].communicate()
        assert running[0].returncode == -signal.SIGKILL
    relay.reset()
    last = mirror_process(root)
    assert last.communicate()[0].startswith("sent ") and last.returncode == 0
    assert contents(server, request.node.name) == whole["plain"][0]


def test_a_record_that_the_store_refuses_does_not_block_the_others(
        server, relay, recorded, whole, tmp_path, monkeypatch, capsys, request):
    monkeypatch.setenv("MLFLOW_TRACKING_URI", relay.uri)
    monkeypatch.setattr(store, "TRIES", 1)
    root = copy_of(recorded["plain"], tmp_path)
    good = records.unsent(root)[0]
    bad = good.with_name("00000000-bad")
    shutil.copytree(good, bad)
    lines = records.read_lines(bad / "events.jsonl")
    lines[0]["pipeline"] = None
    lines.insert(1, {"kind": "tag", "time": 0, "key": "", "value": "a tag without a name"})
    (bad / "events.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    assert mirror.send(root, quiet=True) == 1
    assert "refused 00000000-bad" in capsys.readouterr().err
    assert records.unsent(root) == [bad]


def test_a_run_deleted_in_the_middle_is_sent_anew(server, relay, recorded, whole, tmp_path, monkeypatch, request):
    monkeypatch.setenv("MLFLOW_TRACKING_URI", relay.uri)
    root = copy_of(recorded["plain"], tmp_path)
    last = len(whole["plain"][1]) - 2
    relay.reset(from_request(last, "lose"))
    assert mirror.send(root, quiet=True) == 1
    client = mlflow.MlflowClient(server.uri)
    identity = client.get_experiment_by_name(request.node.name).experiment_id
    child, = client.search_runs([identity], "tags.`offramp.kind` = 'evaluate'")
    client.delete_run(child.info.run_id)
    relay.reset()
    assert mirror.send(root, quiet=True) == 0
    assert contents(server, request.node.name) == whole["plain"][0]


STAGE = """
import os, sys
from pathlib import Path
def watch(event, arguments):
    if event.startswith("socket."):
        os.write(1, f"the stage itself: {event}".encode())
sys.addaudithook(watch)
from stages.tracking import record as tracking
root = Path(sys.argv[1])
sweep = root / "multirun/distill/1" if len(sys.argv) > 2 else None
out = sweep / sys.argv[2] if sweep else root
out.mkdir(parents=True, exist_ok=True)
with tracking.start_run("distill", {"seed": 1, "distill": {"temperature": 2.0}}, out, root, sweep) as run:
    for step in range(250):
        run.metrics({"loss": 5.0 - step, "grad_norm": 1.0}, step=step)
print(*({"mlflow", "requests", "urllib3"} & set(sys.modules)), end="")
"""


def stage(root, *words, **environment):
    return subprocess.Popen([sys.executable, "-c", STAGE, str(root), *words], cwd=ROOT, text=True,
                            env={**os.environ, **environment}, stdout=subprocess.PIPE, stderr=subprocess.PIPE)


def test_a_stage_opens_no_socket_and_its_run_waits_for_a_server_that_comes_later(server, tmp_path):
    port = free_port()
    process = stage(tmp_path, MLFLOW_TRACKING_URI=f"http://127.0.0.1:{port}")
    assert process.communicate() == ("", "") and process.returncode == 0
    wait_until(lambda: not mirrors_of(tmp_path))
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MLFLOW_TRACKING_URI", f"http://127.0.0.1:{port}")
        _, said = stage(tmp_path).communicate()  # its stderr is a pipe: it speaks for the mirror of the first
        assert "was not reached" in said and "python -m stages.tracking sync" in said
    with Relay(server.port) as later:
        assert mirror_process(tmp_path, MLFLOW_TRACKING_URI=later.uri).communicate()[0].count("sent ") == 2
        once = contents(server, os.environ["MLFLOW_EXPERIMENT_NAME"])
        assert [len(entry["metrics"].get("loss", [])) for entry in once] == [250, 250, 0]
        assert mirror_process(tmp_path, MLFLOW_TRACKING_URI=later.uri).communicate()[0] == "everything is sent\n"
        assert contents(server, os.environ["MLFLOW_EXPERIMENT_NAME"]) == once
        later.shutdown()
    status = [sys.executable, "-m", "stages.tracking", "status", "--root", str(tmp_path)]
    assert subprocess.check_output(status, cwd=ROOT, text=True) == "everything is sent\n"


def test_a_server_that_never_answers_holds_the_mirror_for_a_while_and_the_stage_not_at_all(tmp_path, relay):
    relay.reset(lambda number, what: "hold")
    process = stage(tmp_path, MLFLOW_TRACKING_URI=relay.uri, MLFLOW_HTTP_REQUEST_TIMEOUT="300")
    assert process.communicate() == ("", "")  # the end of its pipes: the mirror does not hold them
    wait_until(lambda: relay.count == 1)
    assert mirrors_of(tmp_path)
    status = [sys.executable, "-m", "stages.tracking", "status", "--root", str(tmp_path)]
    assert "FINISHED  0 of 253 events sent\n1 runs wait" in subprocess.check_output(status, cwd=ROOT, text=True)
    relay.release.set()
    wait_until(lambda: not mirrors_of(tmp_path))

    relay.reset(lambda number, what: "hold")
    sync = mirror_process(tmp_path, MLFLOW_TRACKING_URI=relay.uri, MLFLOW_HTTP_REQUEST_TIMEOUT="1")
    assert "was not reached" in sync.communicate()[1] and sync.returncode == 1 and relay.count == 1
    relay.release.set()


TRAINING = """
import sys, time
from pathlib import Path
from stages.tracking import record as tracking
root = Path(sys.argv[1])
with tracking.start_run("distill", {"seed": 1}, root, root) as run:
    run.follow()
    for step in range(100):
        if step == 50:
            while not (root / "go on").exists():
                time.sleep(0.05)
        run.metrics({"loss": 5.0 - step}, step=step)
print(*({"mlflow", "requests", "urllib3"} & set(sys.modules)), end="")
"""


def training(root, **environment):
    """A stage that trains 50 steps, waits for the file `go on`, and trains 50 more."""
    return subprocess.Popen([sys.executable, "-c", TRAINING, str(root)], cwd=ROOT, text=True,
                            env={**os.environ, **environment}, stdout=subprocess.PIPE, stderr=subprocess.PIPE)


def seen_of(server):
    """Status and loss curve of the stage's run, as far as the server has it."""
    client = mlflow.MlflowClient(server.uri)
    experiment = client.get_experiment_by_name(os.environ["MLFLOW_EXPERIMENT_NAME"])
    runs = client.search_runs([experiment.experiment_id], "tags.`offramp.kind` = 'distill'") if experiment else []
    return [(run.info.status, [point.step for point in client.get_metric_history(run.info.run_id, "loss")])
            for run in runs]


def test_curves_show_while_the_stage_trains_and_are_whole_and_there_once_at_its_end(server, tmp_path):
    process = training(tmp_path, MLFLOW_TRACKING_URI=server.uri)
    wait_until(lambda: seen_of(server) == [("RUNNING", list(range(50)))])
    began = time.monotonic()
    by_hand = mirror_process(tmp_path, MLFLOW_TRACKING_URI=server.uri)  # the mirror keeps no other one waiting
    assert "so far: its stage is running" in by_hand.communicate()[0] and time.monotonic() - began < mirror.QUEUE_S / 2
    (tmp_path / "go on").touch()
    assert process.communicate() == ("", "") and process.returncode == 0
    wait_until(lambda: not mirrors_of(tmp_path))
    assert seen_of(server) == [("FINISHED", list(range(100)))] and records.unsent(tmp_path) == []


def test_a_mirror_killed_while_its_stage_trains_is_replaced_at_the_end(server, tmp_path):
    process = training(tmp_path, MLFLOW_TRACKING_URI=server.uri)
    wait_until(lambda: seen_of(server) == [("RUNNING", list(range(50)))])
    follower, = (each for each in mirrors_of(tmp_path) if each.pid != process.pid)
    follower.kill()
    wait_until(lambda: follower.status() == psutil.STATUS_ZOMBIE)  # which its stage will find
    (tmp_path / "go on").touch()
    assert process.communicate() == ("", "") and process.returncode == 0
    wait_until(lambda: not mirrors_of(tmp_path))
    assert seen_of(server) == [("FINISHED", list(range(100)))] and records.unsent(tmp_path) == []


def test_a_stage_killed_while_it_trains_is_sent_as_killed_by_its_own_mirror(server, tmp_path):
    process = training(tmp_path, MLFLOW_TRACKING_URI=server.uri)
    wait_until(lambda: seen_of(server) == [("RUNNING", list(range(50)))])
    process.kill()
    process.communicate()
    wait_until(lambda: not mirrors_of(tmp_path))
    assert seen_of(server) == [("KILLED", list(range(50)))] and records.unsent(tmp_path) == []


def test_while_no_server_answers_the_mirror_of_a_training_stage_does_not_even_import_mlflow(tmp_path):
    process = training(tmp_path, MLFLOW_TRACKING_URI=f"http://127.0.0.1:{free_port()}")
    follower = wait_until(lambda: [each for each in mirrors_of(tmp_path) if each.pid != process.pid])[0]
    wait_until(lambda: (next(tmp_path.glob(".runs/tracking/*/mirror"), None)))
    time.sleep(3)
    assert follower.nice() == 10 and sum(follower.cpu_times()[:2]) < 2.0
    assert not [each.path for each in follower.memory_maps() if "numpy" in each.path]
    (tmp_path / "go on").touch()
    assert process.communicate() == ("", "") and process.returncode == 0
    wait_until(lambda: not mirrors_of(tmp_path))
    assert "was not reached" in (tmp_path / records.FAILURE).read_text()


def test_a_sync_returns_when_the_mirrors_of_ended_stages_have_ended(server, tmp_path):
    process = training(tmp_path, MLFLOW_TRACKING_URI=server.uri)
    wait_until(lambda: seen_of(server))
    (tmp_path / "go on").touch()
    process.communicate()
    assert mirror_process(tmp_path, MLFLOW_TRACKING_URI=server.uri).wait(60) == 0
    held, = tmp_path.glob(".runs/tracking/*/mirror")
    assert not records.is_locked(held) and records.unsent(tmp_path) == []


def test_with_closed_standard_streams_a_stage_is_recorded_and_sent_whole(server, tmp_path):
    (tmp_path / "go on").touch()
    command = [sys.executable, "-c", TRAINING, str(tmp_path)]
    environment = {**os.environ, "MLFLOW_TRACKING_URI": server.uri}
    closed = ["sh", "-c", '"$@" 0<&- 1>&- 2>&-', "sh"]
    assert subprocess.run([*closed, *command], cwd=ROOT, env=environment).returncode == 0
    wait_until(lambda: not mirrors_of(tmp_path))
    assert seen_of(server) == [("FINISHED", list(range(100)))]
    sync = [sys.executable, "-m", "stages.tracking", "sync", "--root", str(tmp_path)]
    for sent in tmp_path.glob(".runs/tracking/*/sent.json"):
        sent.unlink()
    assert subprocess.run([*closed, *sync], cwd=ROOT, env=environment).returncode == 0
    assert seen_of(server) == [("FINISHED", list(range(100)))] and records.unsent(tmp_path) == []


def test_with_docstrings_stripped_a_stage_is_sent_all_the_same(server, tmp_path):
    (tmp_path / "go on").touch()
    process = training(tmp_path, MLFLOW_TRACKING_URI=server.uri, PYTHONOPTIMIZE="2")
    assert process.communicate() == ("", "") and process.returncode == 0
    wait_until(lambda: not mirrors_of(tmp_path))
    assert seen_of(server) == [("FINISHED", list(range(100)))] and records.unsent(tmp_path) == []


def rows(database, table):
    with contextlib.closing(sqlite3.connect(database)) as connection:
        return connection.execute(f"select count(*) from {table}").fetchone()[0]


def test_four_sweep_jobs_at_once_fill_one_new_sqlite_store_and_lose_nothing(tmp_path):
    jobs = [stage(tmp_path, str(job)) for job in range(4)]
    assert [job.communicate() and job.returncode for job in jobs] == [0] * 4
    wait_until(lambda: not mirrors_of(tmp_path))
    assert records.unsent(tmp_path) == []
    database = tmp_path / "mlflow.db"
    assert rows(database, "runs") == 5  # and their parent
    assert rows(database, "metrics") == 4 * 500 and rows(database, "params") == 4 * 2
    client = mlflow.MlflowClient(f"sqlite:///{database}")
    identity = client.get_experiment_by_name(os.environ["MLFLOW_EXPERIMENT_NAME"]).experiment_id
    runs = client.search_runs([identity])
    parent, = (run.info.run_id for run in runs if run.data.tags["offramp.kind"] == "pipeline")
    children = [run for run in runs if run.info.run_id != parent]
    assert {run.data.tags["mlflow.parentRunId"] for run in children} == {parent}
    assert {run.info.run_name for run in children} == {f"distill {job}" for job in range(4)}
    assert {run.info.status for run in runs} == {"FINISHED"}


def test_four_checkouts_at_once_through_the_server_lose_nothing(server, tmp_path):
    for job in range(4):
        (tmp_path / str(job)).mkdir()
    jobs = [stage(tmp_path / str(job), "0", MLFLOW_TRACKING_URI=server.uri) for job in range(4)]
    assert [job.communicate() and job.returncode for job in jobs] == [0] * 4
    wait_until(lambda: not mirrors_of(tmp_path))
    assert [records.unsent(tmp_path / str(job)) for job in range(4)] == [[]] * 4
    found = contents(server, os.environ["MLFLOW_EXPERIMENT_NAME"])
    assert len(found) == 8
    for entry in found:
        loss, params = ([], {}) if entry["name"].startswith("sweep") else (
            list(range(250)), {"seed": "1", "distill.temperature": "2.0"})
        assert [point[0] for point in entry["metrics"].get("loss", [])] == loss and entry["params"] == params


def test_no_secret_reaches_the_record_the_server_or_what_is_printed(server, relay, tmp_path, monkeypatch, capfd):
    secrets = {"HF_TOKEN": "plainlooking-1", "AWS_SECRET_ACCESS_KEY": "plain/looking+2", "OPENAI_KEY": "plainlooking-3",
               "MLFLOW_TRACKING_PASSWORD": "plainlooking-4", "DB_URL": "postgresql://me:plainlooking-5@db/x"}
    for name, value in secrets.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("MLFLOW_TRACKING_URI", relay.uri.replace("//", "//me:plainlooking-6@"))
    values = [*(value.encode() for value in secrets.values()), *(b"plainlooking-%d" % n for n in range(10))]
    said = " ".join(secrets.values())
    monkeypatch.setattr(tracking, "_start_mirror", lambda folder, store: None)
    data = tmp_path / "artifacts/data"
    data.mkdir(parents=True)
    (data / "card.json").write_text(json.dumps({"corpus": {"name": f"https://me:plainlooking-7@host/ {said}"}}))
    (tmp_path / "dvc.yaml").write_text("stages: {distill: {deps: [artifacts/data]}}")
    (tmp_path / "index.html").write_text(f"<p>{said} https://me:plainlooking-8@host/x</p>")
    (tmp_path / "student").mkdir()
    (tmp_path / "student/model.safetensors").write_bytes(b"weights")
    path = "https://me:plainlooking-9@host/a.txt"
    settings = {"corpus": {"paths": [path]}, "note": said, "password": "plainlooking-0"}
    sweep = tmp_path / "multirun/1"
    (sweep / "0/.hydra").mkdir(parents=True)
    (sweep / "0/.hydra/overrides.yaml").write_text(json.dumps([f"note={said}", path]))
    with pytest.raises(ValueError), tracking.start_run("distill", settings, sweep / "0", tmp_path, sweep) as run:
        run.text("samples.txt", said)
        run.tag("note", said)
        run.artifact(tmp_path / "index.html")
        run.model(tmp_path / "student")
        raise ValueError("x" * 470 + said)  # cut in the middle of one

    relay.reset(lambda number, what: "lose")
    assert mirror.send(tmp_path) == 1
    relay.reset()
    assert mirror.send(tmp_path) == 0
    printed = "".join(capfd.readouterr()).encode()
    assert b"://***@127.0.0.1" in printed and b"sent " in printed
    record = [path for path in (tmp_path / ".runs").rglob("*") if path.is_file()]
    stored = [path for path in server.folder.rglob("*") if path.is_file()]
    assert len(record) > 4 and len(stored) > 10
    for what in [printed, *(path.read_bytes() for path in [*record, *stored])]:
        assert not [value for value in values if value in what]
    page, = server.folder.rglob("index.html")
    assert "https://***@host/x" in page.read_text()


def test_make_ui_names_another_port_where_the_one_it_is_to_use_is_taken():
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        command = ["make", "-o", ".venv/.run", "ui", f"PORT={port}"]
        path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
        done = subprocess.run(command, cwd=ROOT, env={**os.environ, "PATH": path}, capture_output=True, text=True)
    assert done.returncode != 0 and done.stdout == ""
    assert done.stderr.splitlines()[0] == f"port {port} is in use: make ui PORT={port + 1}"


def test_the_server_of_make_ui_listens_on_loopback_only(server):
    listening = [connection.laddr.ip for process in server.processes()
                 for connection in process.net_connections(kind="inet") if connection.status == psutil.CONN_LISTEN]
    assert set(listening) == {"127.0.0.1"}
