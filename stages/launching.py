"""Starts the ranks of a training stage through torchrun. The stage process itself is never a rank: it composes
the settings once, and a Hydra sweep or a retry can never give two ranks different hyperparameters.
"""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import asdict
from pathlib import Path

from stages.artifacts import Refusal, read_json, write_atomically, write_json
from stages.provenance import cores, device_conditions
from stages.resuming import resume_key
from stages.runs import die_with_parent


def rank_count(accelerator: str, ranks: int | str) -> tuple[str, int]:
    """The accelerator to use and how many ranks: two gloo processes on CPU, one rank per GPU over NCCL."""
    import torch

    if accelerator == "auto":
        accelerator = "gpu" if torch.cuda.is_available() else "cpu"
    if accelerator == "gpu" and not torch.cuda.is_available():
        raise Refusal("trainer.accelerator = gpu: this machine shows no CUDA device; use cpu or auto")
    if ranks == "auto":
        ranks = torch.cuda.device_count() if accelerator == "gpu" else 2
    if accelerator == "gpu" and int(ranks) > torch.cuda.device_count():
        raise Refusal(f"trainer.ranks = {ranks}: this machine has {torch.cuda.device_count()} GPUs")
    return accelerator, int(ranks)


def chosen_precision(precision: str, accelerator: str) -> str:
    """bfloat16 autocast where the matrix units have it: detected, not assumed."""
    from stages.layers import has_bfloat16

    if precision == "auto":
        precision = "bfloat16" if has_bfloat16("cuda" if accelerator == "gpu" else "cpu") else "float32"
    return precision


def launch(stage: str, settings, place, inputs: list[str], run) -> tuple[dict, dict]:
    """Runs `stages.<stage>.fits` in every rank; returns rank zero's results by name of the fit, and the conditions.

    A failure of any rank ends all of them; its one-line reason is raised here as a Refusal.
    """
    plain = {k: v for k, v in asdict(settings).items() if v is not None}
    accelerator, ranks = rank_count(settings.trainer.accelerator, settings.trainer.ranks)
    conditions = {
        **device_conditions(ranks if accelerator == "gpu" else 0),
        "ranks": ranks,
        "threads_per_rank": 1 if accelerator == "gpu" else max(1, cores() // ranks),
        "precision": chosen_precision(settings.trainer.precision, accelerator),
        "deterministic": settings.trainer.deterministic,
    }
    if accelerator == "gpu":
        from stages.layers import can_compile  # late: it imports torch

        conditions["compiled"] = can_compile()
    for path in inputs:
        if not place.read(path).exists():
            raise Refusal(f"{path} is missing: run the stage that writes it (dvc repro)")
    if not conditions.get("compiled", True):
        print(f"{stage}: no gcc and no clang here: training runs uncompiled and takes half as long again", flush=True)
    key = resume_key(stage, [plain, conditions], [place.read(path) for path in inputs])
    state = place.root / ".runs" / "resume" / f"{stage}-{key}"
    state.mkdir(parents=True, exist_ok=True)
    for name in ("error.txt", "result.json", "steps.jsonl"):
        (state / name).unlink(missing_ok=True)
    job = {"stage": stage, "settings": plain, "accelerator": accelerator, "precision": conditions["precision"]}
    job |= {"root": str(place.root), "out": str(place.out), "state": str(state)}
    write_atomically(state / "job.json", json.dumps(job))  # not write_json, which rounds: ranks get the exact settings

    started = time.monotonic()
    code = _run_ranks(state / "job.json", conditions)
    speeds = _record_steps(state / "steps.jsonl", run)  # also of a run that failed
    if code != 0:
        error = state / "error.txt"
        if error.exists():
            raise Refusal(error.read_text().strip())
        raise Refusal(f"a rank of {stage} ended with code {code}; its last words are in {state / 'ranks.log'}")
    result = read_json(state / "result.json")
    clock = {"seconds": time.monotonic() - started, "ranks": ranks, "accelerator": accelerator}
    write_json(place.write(f"measurements/{stage}.json"), clock | speeds)
    shutil.rmtree(state)  # finished: the outs are the state now
    return result, conditions


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


def _run_ranks(job: Path, conditions: dict) -> int:
    threads = str(conditions["threads_per_rank"])  # for MKL too: torch takes its number over OpenMP's
    environment = os.environ | {"OMP_NUM_THREADS": threads, "MKL_NUM_THREADS": threads, "TORCH_CPP_LOG_LEVEL": "ERROR"}
    environment |= {"GLOO_SOCKET_IFNAME": "lo", "NCCL_SOCKET_IFNAME": "lo"}  # ranks listen for each other only
    environment["PYTHONPATH"] = os.pathsep.join(
        filter(None, [str(Path(__file__).parent.parent), os.environ.get("PYTHONPATH")])
    )
    if conditions["accelerator"] != "none" and conditions["deterministic"]:
        # cuBLAS sums in one order only in workspaces of its own, NCCL only where the switch does not add for it, the
        # compiler only where it does not try out which order is the fastest
        environment |= {"CUBLAS_WORKSPACE_CONFIG": ":4096:8", "NCCL_ALGO": "Ring", "TORCHINDUCTOR_DETERMINISTIC": "1"}
    command = [sys.executable, "-m", "stages.torchrun", str(job), str(conditions["ranks"])]
    with (job.parent / "ranks.log").open("wb") as log:
        process = subprocess.Popen(command, env=environment, stderr=log, preexec_fn=die_with_parent)
        previous = {
            s: signal.signal(s, lambda number, _: process.send_signal(number)) for s in (signal.SIGTERM, signal.SIGINT)
        }
        try:
            return process.wait()
        finally:
            for number, handler in previous.items():
                signal.signal(number, handler)
