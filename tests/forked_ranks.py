"""Ranks as forks of the test's process: they have its imports, whose seconds a new process would spend anew."""

import os
import pickle
import signal
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

SECONDS = 300


def in_ranks(ranks: int, folder: Path, work: Callable[[int], Any], of_machine: int | None = None) -> list[Any]:
    """What `work(rank)` gives in each of so many ranks, joined by gloo; `of_machine` of them count as one machine."""
    folder.mkdir(parents=True, exist_ok=True)
    meeting = folder / f"meeting-{time.monotonic_ns()}"
    children = {}
    for rank in range(ranks):
        pid = os.fork()
        if pid == 0:
            _run(rank, ranks, of_machine or ranks, meeting, work)
        children[pid] = rank
    deadline, failed = time.monotonic() + SECONDS, []
    while children:
        pid, status = os.waitpid(-1, os.WNOHANG)
        if pid in children:
            failed += [children[pid]] if status else []
            del children[pid]
        late = time.monotonic() > deadline
        if failed or late:
            for other in children:
                os.kill(other, signal.SIGKILL)
                os.waitpid(other, 0)
            reasons = [path.read_text() for path in sorted(folder.glob(f"{meeting.name}-*.error"))]
            raise AssertionError("".join(reasons) or f"ranks {failed} ended; late: {late}")
        time.sleep(0.005)
    return [pickle.loads((folder / f"{meeting.name}-{rank}").read_bytes()) for rank in range(ranks)]


def _run(rank: int, ranks: int, of_machine: int, meeting: Path, work: Callable[[int], Any]) -> None:
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
        meeting.with_name(f"{meeting.name}-{rank}").write_bytes(pickle.dumps(work(rank)))
        code = 0
    except BaseException:
        meeting.with_name(f"{meeting.name}-{rank}.error").write_text(traceback.format_exc())
    finally:
        os._exit(code)
