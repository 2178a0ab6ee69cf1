"""torchrun for the ranks of one machine: `torch.distributed.run` with one thing changed.

The store in which the ranks meet listens on the loopback interface. torchrun's own listens on all of them, and anybody
who reaches it may write what the ranks read. Runs over several machines start `stages.training.rank` with torchrun
itself.
"""

import os
import signal
import socket
from pathlib import Path

from torch.distributed import TCPStore, run
from torch.distributed.elastic.multiprocessing.api import SignalException
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
from torch.distributed.elastic.rendezvous import RendezvousParameters, rendezvous_handler_registry
from torch.distributed.elastic.rendezvous.static_tcp_rendezvous import StaticTCPRendezvous

from stages.files.artifacts import Refusal, write_atomically
from stages.files.resuming import only_holder

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


def stopped(number, _):
    """As torchrun takes a signal once the ranks are there."""
    raise SignalException("stopped before the ranks were there", signal.Signals(number))


def run_ranks(job: Path, ranks: int) -> int:
    """Runs the job in so many ranks; the exit code of the whole, and a reason in error.txt beside the job."""
    with (job.parent / "ranks.log").open("wb") as log:
        os.dup2(log.fileno(), 2)  # of the ranks, too
    rendezvous_handler_registry.register(BACKEND, LoopbackRendezvous)
    reason_file = job.parent / "error.txt"
    busy = "the ranks of the run before have not ended: end them, then run this again"
    try:
        with only_holder(job.parent / "ranks.lock", "ranks", busy):  # ranks outlive a stage that was killed
            reason_file.unlink(missing_ok=True)
            for number in (signal.SIGTERM, signal.SIGINT):
                signal.signal(number, stopped)
            options = ["--nproc-per-node", str(ranks), "--rdzv-backend", BACKEND]
            options += ["--log-dir", str(job.parent / "torchrun")]  # by default a folder in /tmp that nobody removes
            # With the number of this process: a rank that starts when it is dead must not go on.
            run.main([*options, "-m", "stages.training.rank", str(job), str(os.getpid())])
    except Refusal as refusal:
        write_atomically(reason_file, str(refusal))
        return 1
    except ChildFailedError as error:
        reason = killed(error)
        if reason and not reason_file.exists():
            more = f"the same command continues from the last checkpoint; more is in {job.parent / 'ranks.log'}"
            write_atomically(reason_file, f"{reason}; {more}")
        return 1
    except SignalException as stop:
        if not reason_file.exists():  # no rank had a step to finish
            name = signal.Signals(stop.sigval).name
            write_atomically(reason_file, f"interrupted by {name}; the same command continues from the last checkpoint")
        return 1
    return 0
