"""MLflow servers that are away, slow or killed."""

import contextlib
import http.server
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

from benchmarks.checkout import environment
from chaos.bench import Bench, Row
from chaos.commands import (
    HANG_SECONDS,
    MIRROR_SECONDS,
    NO_SERVER,
    REPRO,
    free_port,
    line_with,
    output_of,
    stage_command,
    start,
    succeeds,
    wait_for,
    wait_until_idle,
)
from stages.tracking.records import unsent

STAGES = ("prepare", "evaluate", "report")


def seconds_of(tree: Path, **variables: str) -> float:
    began = time.monotonic()
    succeeds(tree, *REPRO, "-f", "-s", *STAGES, **variables)
    return time.monotonic() - began


def recorded(bench: Bench, row: Row, name: str, uri: str) -> Path:
    """Three stages against a server that fails: nothing waits for it, and the record goes out once, later."""
    tree = bench.copy(name)
    plain = seconds_of(tree)
    wait_until_idle(tree, MIRROR_SECONDS)
    row.tried += 1
    added = seconds_of(tree, MLFLOW_TRACKING_URI=uri) - plain
    bench.compare(tree, row)
    assert added < 10 + plain / 2, f"{added:.0f} s more than {plain:.0f} s without the server"
    wait_until_idle(tree, MIRROR_SECONDS)
    row.message = f"{added:+.1f} s on {plain:.1f} s: {line_with('was not reached', output_of(tree))}"
    return tree


def sent_once(tree: Path, uri: str | None, records: int) -> None:
    """`sync` sends what is left, and the store then has every record as one run."""
    variables = {"MLFLOW_TRACKING_URI": uri} if uri else {}
    succeeds(tree, *stage_command("tracking", "sync"), **variables)
    assert not unsent(tree)
    import mlflow

    client = mlflow.MlflowClient(uri or f"sqlite:///{tree / 'mlflow.db'}")
    runs = client.search_runs([client.get_experiment_by_name("offramp").experiment_id], max_results=1000)
    names = [run.data.tags["offramp.record"] for run in runs if "offramp.record" in run.data.tags]
    assert len(names) == len(set(names)) == records, f"{len(names)} runs of {len(set(names))} records, not {records}"


def mlflow_unreachable(bench: Bench, row: Row) -> None:
    """no MLflow server listens"""
    tree = recorded(bench, row, "mlflow-unreachable", NO_SERVER)
    sent_once(tree, None, 2 * len(STAGES))
    row.survived += 1


class SlowServer(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        time.sleep(10)
        with contextlib.suppress(OSError):  # the client has gone
            self.send_response(200)
            self.end_headers()

    do_POST = do_GET

    def log_message(self, *_):
        pass


def mlflow_slow(bench: Bench, row: Row) -> None:
    """an MLflow server that takes 10 s for each answer"""
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), SlowServer) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        tree = recorded(bench, row, "mlflow-slow", f"http://127.0.0.1:{server.server_port}")
        server.shutdown()
    sent_once(tree, None, 2 * len(STAGES))
    row.survived += 1


@contextlib.contextmanager
def mlflow_server(folder: Path, port: int) -> Iterator[subprocess.Popen]:
    words = [sys.executable, "-m", "mlflow", "server", "--host", "127.0.0.1", "--port", str(port), "--workers", "1"]
    words += ["--backend-store-uri", f"sqlite:///{folder / 'served.db'}", "--artifacts-destination", str(folder / "to")]
    variables = environment(MLFLOW_SERVER_ENABLE_JOB_EXECUTION="false")
    folder.mkdir(exist_ok=True)
    with (folder / "server.log").open("ab") as log:
        server = subprocess.Popen(words, cwd=folder, env=variables, stdout=log, stderr=log, start_new_session=True)
    try:
        deadline = time.monotonic() + 120
        while True:
            assert server.poll() is None and time.monotonic() < deadline, (folder / "server.log").read_text()[-2000:]
            with contextlib.suppress(OSError):
                socket.create_connection(("127.0.0.1", port), timeout=1).close()
                break
            time.sleep(0.3)
        yield server
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(server.pid, signal.SIGKILL)
        server.wait()


def mlflow_dies(bench: Bench, row: Row) -> None:
    """a real MLflow server is killed while it receives a run, and comes back later"""
    port = free_port()
    uri, store = f"http://127.0.0.1:{port}", bench.folder / "mlflow-server"
    tree = bench.copy("mlflow-dies")
    with mlflow_server(store, port) as server:
        process = start(tree, *REPRO, "-f", "-s", *STAGES, MLFLOW_TRACKING_URI=uri)
        wait_for(lambda: list(tree.glob(".runs/tracking/*/sent.json")), process, tree)  # the first run is on its way
        row.tried += 1
        os.killpg(server.pid, signal.SIGKILL)
        assert process.wait(HANG_SECONDS) == 0, output_of(tree)
    bench.compare(tree, row)
    wait_until_idle(tree, MIRROR_SECONDS)
    row.message = line_with("was not reached", output_of(tree))
    with mlflow_server(store, port):
        sent_once(tree, uri, len(STAGES))
    row.survived += 1
