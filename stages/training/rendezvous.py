"""torchrun for the ranks of one machine, alone or as one node of several: `torch.distributed.run` with one thing
changed.

The store in which the ranks meet listens on one address: the loopback interface where there is one machine, else the
address of node 0 that the others were given. torchrun's own listens on all of them, and anybody who reaches it may
write what the ranks read.
"""

import contextlib
import errno
import os
import signal
import socket
import threading
import time
from datetime import timedelta
from pathlib import Path

from torch.distributed import TCPStore, run
from torch.distributed.elastic.multiprocessing.api import SignalException
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
from torch.distributed.elastic.rendezvous import RendezvousParameters, rendezvous_handler_registry
from torch.distributed.elastic.rendezvous.static_tcp_rendezvous import StaticTCPRendezvous

from stages.files.artifacts import Refusal, write_atomically
from stages.files.resuming import only_holder
from stages.training.nodes import ALONE, Nodes

BACKEND = "offramp"
LOOK_SECONDS = 0.2  # between two looks at who has come


class Rendezvous(StaticTCPRendezvous):
    """Nodes with fixed numbers, and a store on a socket that is already bound when its address is told."""

    def __init__(self, store: TCPStore, nodes: Nodes, parameters: RendezvousParameters):
        timeout = round(nodes.join_seconds)
        super().__init__(store.host, store.port, nodes.rank, nodes.count, parameters.run_id, timeout)
        self._store = store

    def get_backend(self) -> str:
        return BACKEND


def meet(nodes: Nodes) -> TCPStore:
    """The store of the run, once all nodes have come; a Refusal where they have not in time, or the port is taken.

    It looks again and again rather than wait inside the store's own code, which no signal ends.
    """
    deadline, where = time.monotonic() + nodes.join_seconds, f"{nodes.address}:{nodes.port}"
    timeout = timedelta(seconds=nodes.join_seconds)
    if nodes.rank == 0:
        try:
            listener = socket.create_server((nodes.address, nodes.port))
        except OSError as error:
            fix = "choose another engine.master_port, the same on every node, or end who has it"
            if error.errno == errno.EADDRNOTAVAIL:
                fix = "engine.master_address is to be an address of this machine, as it is node 0"
            raise Refusal(f"node 0 cannot listen on {where} ({os.strerror(error.errno or 0)}): {fix}") from None
        address, port = listener.getsockname()
        store = TCPStore(address, port, 1, is_master=True, timeout=timeout, master_listen_fd=listener.detach())
    else:
        store = _joined(nodes, deadline, f"no node 0 answers on {where}: start it with engine.node_rank=0")
    if nodes.count > 1:
        if store.add(f"node-{nodes.rank}", 1) > 1:
            raise Refusal(f"another node {nodes.rank} has come to {where}: give each its own engine.node_rank")
        store.add("nodes", 1)
        if nodes.rank == 0:
            others = "node 1" if nodes.count == 2 else f"nodes 1 to {nodes.count - 1}"
            print(f"node 0 of {nodes.count} is at {where} and waits for {others}", flush=True)
        missing = f"not all {nodes.count} nodes have come to {where}: start the same command on each"
        _wait(lambda: store.add("nodes", 0) >= nodes.count, deadline, missing)
    return store


def _wait(come, deadline: float, otherwise: str) -> None:
    began = time.monotonic()
    while not come():
        if time.monotonic() > deadline:
            raise Refusal(f"{otherwise} (waited {time.monotonic() - began:.0f} s: engine.join_seconds)")
        time.sleep(LOOK_SECONDS)


def _joined(nodes: Nodes, deadline: float, otherwise: str) -> TCPStore:
    """The store of node 0. The store's own code tries until the time is over, so it does that in a thread."""
    found: list[TCPStore] = []

    def join():
        with contextlib.suppress(RuntimeError):  # as torch tells that it was in vain
            timeout = timedelta(seconds=nodes.join_seconds)
            found.append(TCPStore(nodes.address, nodes.port, None, is_master=False, timeout=timeout))

    thread = threading.Thread(target=join, daemon=True)
    thread.start()
    _wait(lambda: bool(found), deadline, otherwise)
    return found[0]


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


def run_ranks(job: Path, ranks: int, nodes: Nodes = ALONE) -> int:
    """Runs the job in so many ranks of this node; the exit code of the whole, and a reason in error.txt beside it."""
    own = f"-{nodes.rank}" if nodes.rank else ""  # the nodes may share the folder
    with (job.parent / f"ranks{own}.log").open("wb") as log:
        os.dup2(log.fileno(), 2)  # of the ranks, too
    reason_file = job.parent / "error.txt"
    busy = "the ranks of the run before have not ended: end them, then run this again"
    again = "the same command" if nodes.count == 1 else "the same command on every node"
    try:
        with only_holder(job.parent / f"ranks{own}.lock", "ranks", busy):  # ranks outlive a stage that was killed
            if nodes.rank == 0:
                reason_file.unlink(missing_ok=True)
            for number in (signal.SIGTERM, signal.SIGINT):
                signal.signal(number, stopped)
            store = meet(nodes)
            rendezvous_handler_registry.register(BACKEND, lambda parameters: Rendezvous(store, nodes, parameters))
            options = ["--nnodes", str(nodes.count), "--nproc-per-node", str(ranks), "--rdzv-backend", BACKEND]
            options += ["--log-dir", str(job.parent / "torchrun")]  # by default a folder in /tmp that nobody removes
            # With the number of this process: a rank that starts when it is dead must not go on.
            run.main([*options, "-m", "stages.training.rank", str(job), str(os.getpid())])
    except Refusal as refusal:
        write_atomically(reason_file, str(refusal))
        return 1
    except ChildFailedError as error:
        reason = killed(error)
        if nodes.count > 1 and not reason:
            reason = f"a rank of node {nodes.rank} failed, as it does where another node is lost"
        if reason and not reason_file.exists():
            more = f"{again} continues from the last checkpoint; more is in {job.parent / f'ranks{own}.log'}"
            write_atomically(reason_file, f"{reason}; {more}")
        return 1
    except SignalException as stop:
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, signal.SIG_IGN)  # a second one must not cut the reason short
        if not reason_file.exists():  # no rank had a step to finish
            name = signal.Signals(stop.sigval).name
            write_atomically(reason_file, f"interrupted by {name}; {again} continues from the last checkpoint")
        return 1
    return 0
