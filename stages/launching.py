"""Starts the ranks of a training stage through torchrun. The stage process itself is never a rank: it composes
the settings once, and a Hydra sweep or a retry can never give two ranks different hyperparameters. Nor does it import
torch: what there is to compute on it asks of torchrun's process, which imports torch anyway.
"""

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from dataclasses import asdict
from pathlib import Path

from stages.artifacts import Refusal, read_json, write_atomically, write_json
from stages.resuming import resume_key
from stages.runs import die_with_parent
from stages.settings import refuse_uneven_batches


class Torchrun:
    """The process of stages.torchrun: it says what training would run on, and then runs it there."""

    def __enter__(self) -> "Torchrun":
        environment = os.environ | {"TORCH_CPP_LOG_LEVEL": "ERROR"}
        environment |= {"GLOO_SOCKET_IFNAME": "lo", "NCCL_SOCKET_IFNAME": "lo"}  # ranks listen for each other only
        environment["PYTHONPATH"] = os.pathsep.join(
            filter(None, [str(Path(__file__).parent.parent), os.environ.get("PYTHONPATH")])
        )
        self._socket, theirs = socket.socketpair()
        command = [sys.executable, "-m", "stages.torchrun", str(theirs.fileno())]
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
        answer = json.loads(self._told(asdict(trainer)) or "{}")
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
    plain = {k: v for k, v in asdict(settings).items() if v is not None}
    for path in inputs:
        if not place.read(path).exists():
            raise Refusal(f"{path} is missing: run the stage that writes it (dvc repro)")
    started = time.monotonic()
    with Torchrun() as torchrun:
        conditions = torchrun.conditions(settings.trainer)
        refuse_uneven_batches(settings, conditions["ranks"])
        if not conditions.get("compiled", True):
            slow = "no gcc and no clang here: training runs uncompiled and takes half as long again"
            print(f"{stage}: {slow}", flush=True)
        state = _state(stage, plain, conditions, place, inputs)
        code = torchrun.run(state / "job.json")
    speeds = _record_steps(state / "steps.jsonl", run)  # also of a run that failed
    if code != 0:
        error = state / "error.txt"
        if error.exists():
            raise Refusal(error.read_text().strip())
        raise Refusal(f"a rank of {stage} ended with code {code}; its last words are in {state / 'ranks.log'}")
    result = read_json(state / "result.json")
    clock = {"seconds": time.monotonic() - started, "ranks": conditions["ranks"]}
    clock |= {"accelerator": accelerator(conditions)}
    write_json(place.write(f"measurements/{stage}.json"), clock | speeds)
    shutil.rmtree(state)  # finished: the outs are the state now
    return result, conditions


def _state(stage: str, plain: dict, conditions: dict, place, inputs: list[str]) -> Path:
    """The folder of this work, in which the ranks find their job, and what an interrupted run of it has kept."""
    key = resume_key(stage, [plain, conditions], [place.read(path) for path in inputs])
    state = place.root / ".runs" / "resume" / f"{stage}-{key}"
    state.mkdir(parents=True, exist_ok=True)
    for name in ("error.txt", "result.json", "steps.jsonl"):
        (state / name).unlink(missing_ok=True)
    job = {"stage": stage, "settings": plain, "accelerator": accelerator(conditions)}
    job |= {"precision": conditions["precision"]}
    job |= {"root": str(place.root), "out": str(place.out), "state": str(state)}
    write_atomically(state / "job.json", json.dumps(job))  # not write_json, which rounds: ranks get the exact settings
    return state


def accelerator(conditions: dict) -> str:
    """As Lightning calls it."""
    return "cpu" if conditions["accelerator"] == "none" else "gpu"


def _record_steps(path: Path, run) -> dict[str, float]:
    """Hands rank zero's figures to the record of the run; returns the last speed of each fit."""
    speeds: dict[str, float] = {}
    for line in path.read_text().splitlines() if path.exists() else []:
        row = json.loads(line)
        run.metrics(row["figures"], step=row["step"], at=row["time"])
        speeds |= {k: v for k, v in row["figures"].items() if k.endswith("tokens_per_second")}
    return speeds


def write_curves(path: Path, result: dict) -> None:
    """The training curves of a stage's fits as CSV; an empty field where a step was not validated."""
    lines = ["model,step,loss,validation_bits_per_byte"]
    for name, fit in result.items():
        for row in fit["curve"]:
            bits = "" if row["validation_bits_per_byte"] is None else row["validation_bits_per_byte"]
            lines.append(f"{name},{row['step']},{row['loss']},{bits}")
    write_atomically(path, "\n".join(lines) + "\n")
