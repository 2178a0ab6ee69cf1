"""torchrun on this machine, in a process of its own: `python -m stages.training.launchers.torchrun <socket>`. The
machine is alone, or one node of several that meet at an address.

The stage process does not import torch: the child, which imports it anyway, says what training would run on. Both
ends of the socket are here. A message is a line of JSON:

    stage -> child   the section `trainer` of the settings, and the nodes
    child -> stage   the conditions, or {"refusal": reason}
    stage -> child   the path of the job; the child then runs the ranks, and its exit code is theirs
"""

import json
import os
import signal
import socket
import subprocess
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Any

from stages.files.artifacts import Refusal
from stages.run.entry import die_with_parent, leave
from stages.training.environment import agent_environment, rank_environment
from stages.training.nodes import ALONE, Nodes

STOPS = (signal.SIGTERM, signal.SIGINT)


class Line:
    """One end of the socket."""

    def __init__(self, end: socket.socket):
        self.socket, self.file = end, end.makefile("r")

    def send(self, message: Any) -> None:
        """Not by a file: one that the other side did not read to its end would be sent again by `close`, and fail."""
        self.socket.sendall(f"{json.dumps(message)}\n".encode())

    def receive(self) -> Any:
        """The next message; None where the other side is gone."""
        text = self.file.readline()
        return json.loads(text) if text else None

    def close(self) -> None:
        self.file.close()
        self.socket.close()


class Launcher:
    """The end of the stage process."""

    def __init__(self, nodes: Nodes = ALONE, ranks_per_node: int | None = None):
        self._nodes, self._ranks_per_node = nodes, ranks_per_node

    def __enter__(self) -> "Launcher":
        signal.pthread_sigmask(signal.SIG_BLOCK, STOPS)  # until there is a child, and a handler that ends it
        try:
            self._start()
        except OSError:
            signal.pthread_sigmask(signal.SIG_UNBLOCK, STOPS)
            raise
        try:
            signal.pthread_sigmask(signal.SIG_UNBLOCK, STOPS)  # a signal that has waited is answered here
        except KeyboardInterrupt:
            self.__exit__()
            raise
        return self

    def _start(self) -> None:
        ours, theirs = socket.socketpair()
        command = [sys.executable, "-m", "stages.training.launchers.torchrun", str(theirs.fileno())]
        with theirs:
            self._process = subprocess.Popen(
                command, env=agent_environment(), pass_fds=[theirs.fileno()], preexec_fn=_prepare_child
            )
        self._line, self._running = Line(ours), False
        self._before = {number: signal.signal(number, self._signalled) for number in STOPS}

    def _signalled(self, number, _):
        if not self._running:
            raise KeyboardInterrupt
        self._process.send_signal(number)

    def conditions(self, trainer: dict) -> dict:
        answer = None
        try:
            self._line.send([trainer, asdict(self._nodes), self._ranks_per_node])
            answer = self._line.receive()
        except (BrokenPipeError, ConnectionResetError):
            pass
        if answer is None:
            raise Refusal(f"torchrun ended with code {self._process.wait()} before it could start a rank")
        if "refusal" in answer:
            raise Refusal(answer["refusal"])
        return answer

    def run(self, job: Path) -> int:
        self._running = True
        try:
            self._line.send(str(job))
        except (BrokenPipeError, ConnectionResetError):
            pass  # its exit code says what happened
        return self._process.wait()

    def __exit__(self, *_: object) -> None:
        self._process.kill()  # it has ended, unless something was refused or interrupted before a rank began
        self._process.wait()
        self._line.close()
        for number, handler in self._before.items():
            signal.signal(number, handler)


def _prepare_child() -> None:
    die_with_parent()
    signal.pthread_sigmask(signal.SIG_UNBLOCK, STOPS)
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # in the seconds of its imports the stage process answers Ctrl-C


def serve(line: Line) -> int:
    """The end of the child; its exit code."""
    from stages.training.machine import conditions  # late: these import torch, which the stage process must not
    from stages.training.rendezvous import run_ranks

    try:
        trainer, plain, ranks_per_node = line.receive()
        nodes = Nodes(**plain)
        found = conditions(trainer, nodes.count, ranks_per_node)
        if nodes.count > 1:
            nodes = nodes.resolved()
            os.environ |= nodes.network_environment()
    except Refusal as refusal:
        line.send({"refusal": str(refusal)})
        return 1
    line.send(found)
    job = line.receive()
    line.close()
    if job is None:  # the stage refused, or is gone
        return 1
    os.environ |= rank_environment(found)
    return run_ranks(Path(job), found["ranks"] // nodes.count, nodes)


if __name__ == "__main__":
    leave(serve(Line(socket.socket(fileno=int(sys.argv[1])))))
