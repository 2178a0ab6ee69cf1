"""The model behind a real `mlflow models serve`: what it answers, what it refuses, and when it stops computing."""

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
import urllib.error
import urllib.request
from pathlib import Path

import psutil
import pytest

from chaos.commands import free_port
from stages.data import shards
from stages.files.artifacts import ROOT, sha256_of
from stages.model import generation
from stages.model import hub as models
from stages.model.families.qwen3.model import Qwen3Shape as StudentShape
from stages.tracking import mirror
from stages.tracking import record as tracking

mlflow = pytest.importorskip("mlflow")
LIMIT_S = 8  # of a request
ENDLESS = {"inputs": ["a"] * 500, "params": {"new_tokens": 4096}}  # many times the limit


def save_tiny_student(root, folder):
    """An untrained student over bytes, and under root the tokenizer and card that it is served with."""
    tokenizer, data = shards.BytesTokenizer(), root / "artifacts/data"
    data.mkdir(parents=True)
    (data / "tokenizer.json").write_text(tokenizer.to_json())
    shards.write_card(data, {
        "tokenizer": "bytes", "tokenizer_sha256": sha256_of(data / "tokenizer.json"),
        "vocab_size": tokenizer.vocab_size, "end_of_text": tokenizer.end_of_text, "splits": {}})
    shape = StudentShape(vocab_size=tokenizer.vocab_size, sequence_tokens=64, layers=1, width=16, heads=2,
                         kv_heads=1, head_dim=8, mlp_width=16, rope_theta=10000.0)
    models.save(models.new_model(shape, seed=1), folder)


@pytest.fixture(scope="module")
def logged(tmp_path_factory):
    """A tiny student, sent to a store as a stage sends it: the store, the model's id, its folder."""
    root = tmp_path_factory.mktemp("served")
    save_tiny_student(root, root / "student")
    with pytest.MonkeyPatch.context() as patch:
        for name in ("DVC_STAGE", "DVC_ROOT", "DVC_EXP_NAME", "MLFLOW_TRACKING_URI", "MLFLOW_EXPERIMENT_NAME"):
            patch.delenv(name, raising=False)
        patch.setattr(tracking, "_start_mirror", lambda folder, store: None)
        with tracking.start_run("distill", {"seed": 1}, root, root) as run:
            run.model(root / "student")
        assert mirror.send(root, quiet=True) == 0
    uri = f"sqlite:///{root}/mlflow.db"
    client = mlflow.MlflowClient(uri)
    experiment = client.get_experiment_by_name("offramp").experiment_id
    return uri, client.search_logged_models([experiment])[0].model_id, root / "student"


class Server:
    def __init__(self, uri, model_id, log):
        self.port = free_port()
        command = [str(Path(sys.executable).with_name("mlflow")), "models", "serve", "--env-manager", "local",
                   "-m", f"models:/{model_id}", "-p", str(self.port), "--timeout", str(LIMIT_S)]
        path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
        self.process = subprocess.Popen(
            command, cwd=ROOT, env={**os.environ, "PATH": path, "MLFLOW_TRACKING_URI": uri}, stdout=log, stderr=log)
        deadline = time.monotonic() + 120
        while not self.answers():
            assert self.process.poll() is None and time.monotonic() < deadline, "the server did not start"
            time.sleep(0.2)

    def answers(self):
        with contextlib.suppress(OSError):
            return urllib.request.urlopen(f"http://127.0.0.1:{self.port}/ping", timeout=5).status == 200
        return False

    def asked(self, body, timeout=60.0):
        """Status and content of the answer."""
        request = urllib.request.Request(
            f"http://127.0.0.1:{self.port}/invocations", json.dumps(body).encode(),
            {"Content-Type": "application/json"})
        try:
            with urllib.request.urlopen(request, timeout=timeout) as answer:
                return answer.status, json.loads(answer.read())
        except urllib.error.HTTPError as error:
            return error.code, error.read().decode()

    def left(self):
        """Starts what would take for ever, as a client that goes away at once."""
        with contextlib.suppress(TimeoutError, urllib.error.URLError):
            self.asked(ENDLESS, timeout=0.5)

    def computed(self):
        """Seconds of processor time of the server's processes until now."""
        below = psutil.Process(self.process.pid).children(recursive=True)
        return sum(sum(process.cpu_times()[:2]) for process in below)


@pytest.fixture(scope="module")
def server(logged, tmp_path_factory):
    with (tmp_path_factory.mktemp("log") / "serve.log").open("w") as log:
        server = Server(*logged[:2], log)
        yield server
        server.process.terminate()
        server.process.wait(30)


def test_it_continues_a_text_as_the_saved_model_does(server, logged):
    tokenizer = shards.BytesTokenizer()
    expected = tokenizer.decode(generation.generate(
        models.load(logged[2]), tokenizer.encode("def "), 12, temperature=0.5, seed=3, end_of_text=256))
    options = {"new_tokens": 12, "temperature": 0.5, "seed": 3}
    assert server.asked({"inputs": ["def "], "params": options}) == (200, {"predictions": [expected]})


@pytest.mark.parametrize("name, values", [
    ("new_tokens", (1, 4096)), ("temperature", (0, 0.0, 1e-9, 10.0)), ("seed", (0, 2**32 - 1))])
def test_both_ends_of_every_bound_are_served(server, name, values):
    for value in values:
        status, answer = server.asked({"inputs": ["a"], "params": {"new_tokens": 2, "temperature": 1.0, name: value}})
        assert status == 200, answer


@pytest.mark.parametrize("name, value", [
    ("new_tokens", 0), ("new_tokens", -1), ("new_tokens", 4097), ("new_tokens", 2.5), ("new_tokens", "many"),
    ("new_tokens", None), ("new_tokens", [3]), ("temperature", -1), ("temperature", 10.1), ("temperature", "hot"),
    ("temperature", float("nan")), ("temperature", float("inf")), ("seed", -1), ("seed", 2**32), ("seed", 10**30),
    ("top_k", 5), ("new_token", 5)])
def test_a_wrong_option_is_answered_with_400_and_one_line_that_names_it(server, name, value):
    status, answer = server.asked({"inputs": ["a"], "params": {name: value}})
    assert status == 400 and name in answer and "Traceback" not in answer and "\n" not in answer.strip()


@pytest.mark.parametrize("prompt, status", [
    ("", 200), ("\0 é", 200), ("a" * 4096, 200), ("a" * 4097, 400), ("a" * 10**6, 400), ("\udc80", 400), ({}, 400)])
def test_any_prompt_is_continued_or_refused(server, prompt, status):
    found, answer = server.asked({"inputs": [prompt], "params": {"new_tokens": 2}})
    assert found == status and "Traceback" not in str(answer), answer


def test_what_a_client_that_left_had_asked_for_ends_at_the_time_limit(server):
    server.left()
    before, deadline = server.computed(), time.monotonic() + LIMIT_S
    while server.computed() - before < 0.5:
        assert time.monotonic() < deadline, "it computes"
        time.sleep(0.1)
    time.sleep(LIMIT_S)
    before = server.computed()
    time.sleep(2)
    assert server.computed() - before < 0.5
    assert server.asked({"inputs": ["a"], "params": {"new_tokens": 2}})[0] == 200


def test_a_server_that_is_told_to_end_does_not_finish_what_it_computes(logged, tmp_path):
    with (tmp_path / "serve.log").open("w") as log:
        server = Server(*logged[:2], log)
    server.left()
    below = psutil.Process(server.process.pid).children(recursive=True)
    server.process.send_signal(signal.SIGTERM)
    server.process.wait(LIMIT_S / 2)
    assert not psutil.wait_procs(below, LIMIT_S / 2)[1]
