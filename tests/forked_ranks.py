"""Ranks as forks of a process that has the imports, whose seconds a new one would spend anew, and nothing else: a fork
of the test's own process never ends where OpenMP or another library has started threads there."""

import multiprocessing
import os
import pickle
import time
import traceback
from collections.abc import Callable
from multiprocessing.connection import wait
from pathlib import Path
from typing import Any

import cloudpickle

SECONDS = 300
CLEAN = multiprocessing.get_context("forkserver")
CLEAN.set_forkserver_preload(["stages.pretrain", "stages.training.rank", "test_evaluate"])


def in_ranks(ranks: int, folder: Path, work: Callable[[int], Any], of_machine: int | None = None) -> list[Any]:
    """What `work(rank)` gives in each of so many ranks, joined by gloo; `of_machine` of them count as one machine.

    `work` takes what it holds with it; a patch in the test's process does not reach the ranks.
    """
    folder.mkdir(parents=True, exist_ok=True)
    meeting = folder / f"meeting-{time.monotonic_ns()}"
    same = ranks, of_machine or ranks, meeting, cloudpickle.dumps(work)
    processes = [CLEAN.Process(target=_run, args=(rank, *same)) for rank in range(ranks)]
    for process in processes:
        process.start()
    running, deadline = {process.sentinel: process for process in processes}, time.monotonic() + SECONDS
    while running:
        ended = wait(list(running), max(0, deadline - time.monotonic()))
        codes = [running.pop(sentinel).exitcode for sentinel in ended]
        if any(codes) or not ended:
            for process in running.values():
                process.kill()
                process.join()
            reasons = [path.read_text() for path in sorted(folder.glob(f"{meeting.name}-*.error"))]
            raise AssertionError("".join(reasons) or f"exit codes {codes}; late: {not ended}")
    return [pickle.loads((folder / f"{meeting.name}-{rank}").read_bytes()) for rank in range(ranks)]


def _run(rank: int, ranks: int, of_machine: int, meeting: Path, work: bytes) -> None:
    code = 1
    try:
        import torch.distributed as dist

        machine, local = divmod(rank, of_machine)
        os.environ |= {
            "RANK": str(rank), "WORLD_SIZE": str(ranks), "LOCAL_RANK": str(local), "GROUP_RANK": str(machine),
            "LOCAL_WORLD_SIZE": str(of_machine), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "1",
            "TORCHELASTIC_RUN_ID": "test", "GLOO_SOCKET_IFNAME": "lo",
        }  # fmt: skip
        dist.init_process_group("gloo", init_method=f"file://{meeting}", rank=rank, world_size=ranks)
        result = pickle.loads(work)(rank)
        meeting.with_name(f"{meeting.name}-{rank}").write_bytes(pickle.dumps(result))
        code = 0
    except BaseException:
        meeting.with_name(f"{meeting.name}-{rank}.error").write_text(traceback.format_exc())
    finally:
        os._exit(code)
