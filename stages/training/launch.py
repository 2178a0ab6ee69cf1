"""Starts the ranks of a training stage through torchrun. The stage process itself is never a rank: it composes
the settings once, and a Hydra sweep or a retry can never give two ranks different hyperparameters. Nor does it import
torch: what there is to compute on it asks of torchrun's process, which imports torch anyway.
"""

import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

from stages.files.artifacts import ROOT, Refusal, read_json, rounded, write_atomically, write_json
from stages.files.resuming import ResumeState, resume_key
from stages.run.entry import die_with_parent
from stages.settings.schema import refuse_uneven_batches

TAIL_S = 1.0  # between two looks at what rank zero has written


class Torchrun:
    """The process of stages.training.torchrun: it says what training would run on, and then runs it there."""

    def __enter__(self) -> "Torchrun":
        environment = os.environ | {"TORCH_CPP_LOG_LEVEL": "ERROR"}
        environment |= {"GLOO_SOCKET_IFNAME": "lo", "NCCL_SOCKET_IFNAME": "lo"}  # ranks listen for each other only
        environment["PYTHONPATH"] = os.pathsep.join(
            filter(None, [str(ROOT), os.environ.get("PYTHONPATH")])
        )
        self._socket, theirs = socket.socketpair()
        command = [sys.executable, "-m", "stages.training.torchrun", str(theirs.fileno())]
        with theirs:
            self._process = subprocess.Popen(
                command, env=environment, pass_fds=[theirs.fileno()], preexec_fn=_as_helper
            )
        self._running = False
        self._before = {number: signal.signal(number, self._signalled) for number in (signal.SIGTERM, signal.SIGINT)}
        return self

    def _signalled(self, number, _):
        if not self._running:
            raise KeyboardInterrupt
        self._process.send_signal(number)

    def conditions(self, trainer) -> dict:
        """What bytes will depend on: accelerator, ranks, threads, precision. Refuses what this machine lacks."""
        answer = json.loads(self._told(trainer.model_dump()) or "{}")
        if not answer:
            raise Refusal(f"torchrun ended with code {self._process.wait()} before it could start a rank")
        if "refusal" in answer:
            raise Refusal(answer["refusal"])
        return answer

    def run(self, job: Path) -> int:
        """Runs the job in every rank; the exit code of the whole."""
        self._running = True
        self._told(str(job))
        return self._process.wait()

    def _told(self, what) -> str:
        """Its answer; empty where it is gone or has nothing more to say."""
        try:
            self._socket.sendall(json.dumps(what).encode() + b"\n")
            with self._socket.makefile() as answers:
                return answers.readline()
        except (BrokenPipeError, ConnectionResetError):
            return ""

    def __exit__(self, *_) -> None:
        self._process.kill()  # it has ended, unless something was refused or interrupted before a rank began
        self._process.wait()
        self._socket.close()
        for number, handler in self._before.items():
            signal.signal(number, handler)


def _as_helper() -> None:
    die_with_parent()
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C in the seconds of its imports is the stage's to tell


def launch(stage: str, settings, place, inputs: list[str], run) -> tuple[dict, dict]:
    """Runs `stages.<stage>.fits` in every rank; returns rank zero's results by name of the fit, and the conditions.

    A failure of any rank ends all of them; its one-line reason is raised here as a Refusal.
    """
    plain = settings.model_dump(exclude_unset=True)
    for path in inputs:
        if not place.read(path).exists():
            raise Refusal(f"{path} is missing: run the stage that writes it (dvc repro)")
    started = time.monotonic()
    with Torchrun() as torchrun:
        run.follow()
        conditions = torchrun.conditions(settings.trainer)
        refuse_uneven_batches(settings, conditions["ranks"])
        if not conditions.get("compiled", True):
            slow = "no gcc and no clang here: training runs uncompiled and takes half as long again"
            print(f"{stage}: {slow}", flush=True)
        print(f"{stage}: {_extent(stage, plain, conditions['ranks'])}, starting", flush=True)
        key = resume_key(stage, [plain, conditions], [place.read(path) for path in inputs])
        with ResumeState(place.root, stage, key) as state:
            job = _write_job(stage, plain, conditions, place, state.folder)
            with _record_steps(state.folder / "steps.jsonl", run) as speeds:
                code = torchrun.run(job)
            if code != 0:
                raise Refusal(_reason(stage, code, state.folder))
            result = read_json(state.folder / "result.json")
    clock = {"seconds": time.monotonic() - started, "ranks": conditions["ranks"]}
    clock |= {"accelerator": accelerator(conditions)}
    write_json(place.write(f"measurements/{stage}.json"), rounded(clock | speeds))
    return result, conditions


def _extent(stage: str, plain: dict, ranks: int) -> str:
    steps = plain[stage].get("recovery", plain[stage])["steps"]
    return f"{ranks} rank{'s' if ranks > 1 else ''}, {steps} steps per model"


def _write_job(stage: str, plain: dict, conditions: dict, place, state: Path) -> Path:
    """The file in which the ranks find what to do; `state` may hold what an interrupted run of it has kept."""
    for name in ("error.txt", "result.json", "steps.jsonl"):
        (state / name).unlink(missing_ok=True)
    job = {"stage": stage, "settings": plain, "accelerator": accelerator(conditions)}
    job |= {"precision": conditions["precision"]}
    job |= {"root": str(place.root), "out": str(place.out), "state": str(state)}
    path = state / "job.json"
    write_json(path, job)
    return path


def _reason(stage: str, code: int, state: Path) -> str:
    """Why the ranks failed, in one line."""
    error = state / "error.txt"
    if error.exists():
        return error.read_text().strip()
    return f"a rank of {stage} ended with code {code}; its last words are in {state / 'ranks.log'}"


def accelerator(conditions: dict) -> str:
    """As Lightning calls it."""
    return "cpu" if conditions["accelerator"] == "none" else "gpu"


@contextlib.contextmanager
def _record_steps(path: Path, run) -> Iterator[dict[str, float]]:
    """Hands rank zero's figures to the record of the run while they are written; yields the last speed of each fit."""
    speeds: dict[str, float] = {}
    ended = threading.Event()

    def tail():
        position, last = 0, False
        while not last:
            last = ended.wait(TAIL_S)  # what was written before the end is still read
            position = _hand_over(path, position, run, speeds)

    thread = threading.Thread(target=tail)
    thread.start()
    try:
        yield speeds
    finally:
        ended.set()
        thread.join()


def _hand_over(path: Path, position: int, run, speeds: dict[str, float]) -> int:
    """Records the whole lines from this position on; returns where the next begins."""
    try:
        with path.open("rb") as file:
            file.seek(position)
            lines = file.read().split(b"\n")[:-1]  # the last piece is being written, or empty
    except OSError:  # no step was logged yet
        return position
    for line in lines:
        with contextlib.suppress(ValueError):  # cut short by a full disk
            row = json.loads(line)
            run.metrics(row["figures"], step=row["step"], at=row["time"])
            speeds |= {k: v for k, v in row["figures"].items() if k.endswith("tokens_per_second")}
    return position + sum(len(line) + 1 for line in lines)


def write_curves(place, stage: str, result: dict) -> None:
    """The training curve of each fit as a CSV of its own, which DVC draws as a line of its own.

    An empty field where a step was not validated.
    """
    for name, fit in rounded(result).items():
        lines = ["step,loss,validation_bits_per_byte"]
        for row in fit["curve"]:
            bits = "" if row["validation_bits_per_byte"] is None else row["validation_bits_per_byte"]
            lines.append(f"{row['step']},{row['loss']},{bits}")
        write_atomically(place.write(f"plots/{stage}/{name}.csv"), "\n".join(lines) + "\n")
