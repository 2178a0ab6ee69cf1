"""torchrun for the ranks of one machine, started by launch.py as `python -m stages.training.torchrun <socket>`.

Through the socket it is asked what training would run on, and then told the job: a line of JSON each.

It is `torch.distributed.run` with one thing changed: the store in which the ranks meet listens on the loopback
interface. torchrun's own listens on all of them, and whoever reaches it may write what the ranks read. Runs over
several machines start `stages.training.rank` with torchrun itself.
"""

import json
import os
import signal
import socket
import sys
from pathlib import Path
from types import SimpleNamespace

import torch
from torch.distributed import TCPStore, run
from torch.distributed.elastic.multiprocessing.api import SignalException
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
from torch.distributed.elastic.rendezvous import RendezvousParameters, rendezvous_handler_registry
from torch.distributed.elastic.rendezvous.static_tcp_rendezvous import StaticTCPRendezvous

from stages.files.artifacts import Refusal, write_atomically
from stages.files.resuming import only_holder
from stages.model.layers import can_compile, has_bfloat16
from stages.run.entry import leave
from stages.run.provenance import cores, device_conditions

BACKEND = "loopback"


# ---- what training would run on


def conditions(trainer) -> dict:
    """What its bytes will depend on; `trainer` is the section of the settings."""
    accelerator, ranks = rank_count(trainer.accelerator, trainer.ranks)
    found = {
        **device_conditions(ranks if accelerator == "gpu" else 0),
        "ranks": ranks,
        "threads_per_rank": 1 if accelerator == "gpu" else max(1, cores() // ranks),
        "precision": chosen_precision(trainer.precision, accelerator),
        "deterministic": trainer.deterministic,
    }
    return found | ({"compiled": can_compile()} if accelerator == "gpu" else {})


def rank_count(accelerator: str, ranks: int | str) -> tuple[str, int]:
    """The accelerator to use and how many ranks: two gloo processes on CPU, one rank per GPU over NCCL."""
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
    if precision == "auto":
        precision = "bfloat16" if has_bfloat16("cuda" if accelerator == "gpu" else "cpu") else "float32"
    return precision


# ---- the ranks


def environment_of(found: dict) -> dict[str, str]:
    threads = str(found["threads_per_rank"])
    variables = {"OMP_NUM_THREADS": threads, "MKL_NUM_THREADS": threads}  # torch takes MKL's number over OpenMP's
    if found["accelerator"] != "none" and found["deterministic"]:
        # cuBLAS sums in one order only in workspaces of its own, NCCL only where the switch does not add for it, the
        # compiler only where it does not try out which order is the fastest
        variables |= {"CUBLAS_WORKSPACE_CONFIG": ":4096:8", "NCCL_ALGO": "Ring", "TORCHINDUCTOR_DETERMINISTIC": "1"}
    return variables


class LoopbackRendezvous(StaticTCPRendezvous):
    """One machine, one agent, and a store on a port that the kernel chose and nobody can take in between."""

    def __init__(self, parameters: RendezvousParameters):
        listener = socket.create_server(("127.0.0.1", 0))
        address, port = listener.getsockname()
        super().__init__(address, port, rank=0, world_size=1, run_id=parameters.run_id, timeout=60)
        self._store = TCPStore(
            address, port, 1, is_master=True, timeout=self.timeout, master_listen_fd=listener.detach()
        )

    def get_backend(self) -> str:
        return BACKEND


def killed(error: ChildFailedError) -> str:
    """One line on the rank that a signal ended, if one did; torchrun itself ends the others with SIGTERM."""
    for rank, failure in error.failures.items():
        if failure.exitcode < 0 and failure.exitcode != -signal.SIGTERM:
            why = ", perhaps for lack of memory" if failure.exitcode == -signal.SIGKILL else ""
            return f"rank {rank} was killed by {signal.Signals(-failure.exitcode).name}{why}"
    return ""


def stopped(number, _):
    """As torchrun takes a signal once the ranks are there."""
    raise SignalException("stopped before the ranks were there", signal.Signals(number))


def run_ranks(job: Path, ranks: int) -> int:
    with (job.parent / "ranks.log").open("wb") as log:
        os.dup2(log.fileno(), 2)  # of the ranks, too
    os.environ["OFFRAMP_TORCHRUN"] = str(os.getpid())  # a rank that starts when this is dead must not go on
    rendezvous_handler_registry.register(BACKEND, LoopbackRendezvous)
    told = job.parent / "error.txt"
    busy = "the ranks of the run before have not ended: end them, then run this again"
    try:
        with only_holder(job.parent / "ranks.lock", "ranks", busy):  # ranks outlive a stage that was killed
            told.unlink(missing_ok=True)
            for number in (signal.SIGTERM, signal.SIGINT):
                signal.signal(number, stopped)
            ranks_of = ["--nproc-per-node", str(ranks), "--rdzv-backend", BACKEND]
            run.main([*ranks_of, "-m", "stages.training.rank", str(job)])
    except Refusal as refusal:
        write_atomically(told, str(refusal))
        return 1
    except ChildFailedError as error:
        reason = killed(error)
        if reason and not told.exists():
            more = f"the same command continues from the last checkpoint; more is in {job.parent / 'ranks.log'}"
            write_atomically(told, f"{reason}; {more}")
        return 1
    except SignalException as stop:
        if not told.exists():  # no rank had a step to finish
            name = signal.Signals(stop.sigval).name
            write_atomically(told, f"interrupted by {name}; the same command continues from the last checkpoint")
        return 1
    return 0


def main(line: socket.socket) -> int:
    with line, line.makefile("rw") as words:
        try:
            found = conditions(SimpleNamespace(**json.loads(words.readline())))
        except Refusal as refusal:
            print(json.dumps({"refusal": str(refusal)}), file=words, flush=True)
            return 1
        print(json.dumps(found), file=words, flush=True)
        job = words.readline()
    if not job:  # the stage refused, or is gone
        return 1
    os.environ |= environment_of(found)
    return run_ranks(Path(json.loads(job)), found["ranks"])


if __name__ == "__main__":
    leave(main(socket.socket(fileno=int(sys.argv[1]))))
