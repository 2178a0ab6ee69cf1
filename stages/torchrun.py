"""torchrun for the ranks of one machine: `python -m stages.torchrun job.json <ranks>`, started by stages.launching.

It is `torch.distributed.run` with one thing changed: the store in which the ranks meet listens on the loopback
interface. torchrun's own listens on all of them, and whoever reaches it may write what the ranks read. Runs over
several machines start `stages.ranks` with torchrun itself.
"""

import os
import signal
import socket
import sys
from pathlib import Path

from torch.distributed import TCPStore, run
from torch.distributed.elastic.multiprocessing.api import SignalException
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
from torch.distributed.elastic.rendezvous import RendezvousParameters, rendezvous_handler_registry
from torch.distributed.elastic.rendezvous.static_tcp_rendezvous import StaticTCPRendezvous

from stages.artifacts import write_atomically
from stages.runs import leave

BACKEND = "loopback"


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


def main(job: Path, ranks: str) -> int:
    os.environ["OFFRAMP_TORCHRUN"] = str(os.getpid())  # a rank that starts when this is dead must not go on
    rendezvous_handler_registry.register(BACKEND, LoopbackRendezvous)
    try:
        run.main(["--nproc-per-node", ranks, "--rdzv-backend", BACKEND, "-m", "stages.ranks", str(job)])
    except ChildFailedError as error:
        reason, told = killed(error), job.parent / "error.txt"
        if reason and not told.exists():
            more = f"the same command continues from the last checkpoint; more is in {job.parent / 'ranks.log'}"
            write_atomically(told, f"{reason}; {more}")
        return 1
    except SignalException as stopped:
        told = job.parent / "error.txt"
        if not told.exists():  # no rank had a step to finish
            name = signal.Signals(stopped.sigval).name
            write_atomically(told, f"interrupted by {name}; the same command continues from the last checkpoint")
        return 1
    return 0


if __name__ == "__main__":
    leave(main(Path(sys.argv[1]), sys.argv[2]))
