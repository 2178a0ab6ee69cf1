"""Machines to try several nodes with, on one: network namespaces of Linux, or the loopback interface.

    with machines(2, megabits=100) as nodes:
        subprocess.Popen(nodes[1].command("python", "-m", ...))
        sent = nodes[1].sent_bytes()

A pair of virtual interfaces joins each namespace to a bridge in one more, and a token bucket (tc tbf) limits what it
sends. It needs root and iproute2; `why_not()` says what is missing.
"""

import contextlib
import functools
import itertools
import json
import os
import re
import shutil
import signal
import subprocess
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

BURST_BYTES = 131_072  # above the largest packet the kernel hands over whole (64 KiB), or each would be cut up
QUEUE_BYTES = 2**24  # above what TCP keeps in flight, or the queue would drop packets and they would be sent twice
PREFIX = "offramp"  # of the names: then the number of the process that made them
made = itertools.count()  # several sets of nodes may be there at once


@dataclass(frozen=True)
class Node:
    name: str  # of its namespace; "": this machine
    address: str
    interface: str

    def command(self, *words: str) -> list[str]:
        """These words, run on the node: the process that is started becomes theirs."""
        return ["ip", "netns", "exec", self.name, *words] if self.name else list(words)

    def sent_bytes(self) -> int:
        """What its interface has sent since it is there, with all headers."""
        (link,) = json.loads(_run("ip", "-n", self.name, "-json", "-stats", "link", "show", self.interface))
        return link["stats64"]["tx"]["bytes"]


@functools.cache
def why_not() -> str:
    """Why nodes cannot be made here; empty where they can."""
    missing = [tool for tool in ("ip", "tc") if shutil.which(tool) is None]
    if missing:
        return f"{', '.join(missing)} is not installed (package iproute2)"
    if os.geteuid() != 0:
        return "network namespaces need root"
    with contextlib.suppress(subprocess.CalledProcessError), machines(2, 100):
        return ""
    return "the kernel refuses network namespaces, bridges or token buckets"


@contextlib.contextmanager
def machines(count: int, megabits: float = 0) -> Iterator[list[Node]]:
    """So many nodes on one network, each sending at most `megabits` per second; 0: without a limit.

    Node k has the address 10.77.0.(k + 1) on its interface eth0. At the end, whatever happens, what still runs in the
    nodes is killed and they are gone; those of a process that was itself killed go when the next one makes some.
    """
    _remove_orphans()
    prefix = f"{PREFIX}{os.getpid()}-{next(made)}"
    switch = f"{prefix}-switch"
    nodes = [Node(f"{prefix}-{k}", f"10.77.0.{k + 1}", "eth0") for k in range(count)]
    try:
        _run("ip", "netns", "add", switch)
        _run("ip", "-n", switch, "link", "add", "bridge", "type", "bridge")
        _run("ip", "-n", switch, "link", "set", "bridge", "up")
        for k, node in enumerate(nodes):
            _join(node, switch, f"port{k}", megabits)
        yield nodes
    finally:
        for name in (*(node.name for node in nodes), switch):
            _remove(name)


@contextlib.contextmanager
def of_any_kind(count: int) -> Iterator[list[Node]]:
    """Network namespaces where they can be made, else agents on the loopback interface."""
    if why_not():
        yield loopback(count)
        return
    with machines(count) as nodes:
        yield nodes


def loopback(count: int) -> list[Node]:
    """As many nodes as agents of this machine can play, where no namespace can be made."""
    return [Node("", "127.0.0.1", "lo")] * count


def _join(node, switch, port, megabits):
    name, interface = node.name, node.interface
    _run("ip", "netns", "add", name)
    _run("ip", "-n", switch, "link", "add", port, "type", "veth", "peer", "name", interface, "netns", name)
    _run("ip", "-n", switch, "link", "set", port, "master", "bridge", "up")
    _run("ip", "-n", name, "address", "add", f"{node.address}/24", "dev", interface)
    _run("ip", "-n", name, "link", "set", interface, "up")
    _run("ip", "-n", name, "link", "set", "lo", "up")
    if megabits:
        limit = ["rate", f"{megabits}mbit", "burst", str(BURST_BYTES), "limit", str(QUEUE_BYTES)]
        _run("tc", "-n", name, "qdisc", "add", "dev", interface, "root", "tbf", *limit)


def _remove(name):
    with contextlib.suppress(subprocess.CalledProcessError):  # where it was never made
        for pid in _run("ip", "netns", "pids", name).split():
            with contextlib.suppress(ProcessLookupError):
                os.kill(int(pid), signal.SIGKILL)
        _run("ip", "netns", "delete", name)


def _remove_orphans():
    for name in _run("ip", "netns", "list").split():
        found = re.match(rf"{PREFIX}(\d+)-", name)
        if found and not Path(f"/proc/{found[1]}").exists():
            _remove(name)


def _run(*words):
    return subprocess.run(words, check=True, capture_output=True, text=True).stdout


def results_of(processes: Sequence[subprocess.Popen], folder: Path) -> list[dict[str, Any]]:
    """What every rank has left in `<rank>.json` of the folder, once all have ended; a RuntimeError where one failed."""
    try:
        codes = [process.wait(timeout=600) for process in processes]
    finally:
        for process in processes:
            process.kill()
    if any(codes):
        raise RuntimeError(f"a rank failed: exit codes {codes}; its error stands above")
    return [json.loads((folder / f"{rank}.json").read_text()) for rank in range(len(processes))]
