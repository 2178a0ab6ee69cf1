"""Two nodes train one model: agents on the loopback interface, each with a checkout and half of the cores."""

import os
import shutil
import socket
import subprocess
import time
from collections.abc import Sequence
from functools import partial
from pathlib import Path

from chaos.bench import Bench, Row, in_sheet, remove_results
from chaos.commands import (
    HANG_SECONDS,
    NO_SERVER,
    REPRO,
    checkpoint_of,
    free_port,
    kill_everything,
    last_saved,
    line_with,
    output_of,
    refuses,
    stage_command,
    start,
    wait_for,
    wait_until_idle,
)
from chaos.damage import truncate

NODES = 2
END_SECONDS = 60  # what a lost node leaves must have ended by then, on a busy machine too


def cores_of(node: int) -> list[int]:
    """As many as a rank has where both run on one node: bytes depend on it."""
    cores = sorted(os.sched_getaffinity(0))
    share = max(1, len(cores) // NODES)
    return [cores[(node * share + k) % len(cores)] for k in range(share)]


def checkouts(bench: Bench, name: str) -> list[Path]:
    """One for each node; node 0 is to train the teacher."""
    trees = [bench.copy(f"{name}-{node}") for node in range(NODES)]
    remove_results(trees[0], "pretrain")
    return trees


def engine(port: int) -> str:
    return f"engine: {{name: torchrun, nodes: {NODES}, master_address: 127.0.0.1, master_port: {port}}}"


def start_both(trees: Sequence[Path], port: int) -> list[subprocess.Popen]:
    """`dvc repro pretrain` on node 0, whose sheet names the engine, and the stage by hand on node 1."""
    words = [f"engine.nodes={NODES}", "engine.master_address=127.0.0.1", f"engine.master_port={port}"]
    by_hand = stage_command("pretrain", "engine=torchrun", *words, "engine.node_rank=1", "hydra.run.dir=outputs/node-1")
    running = []
    for node, command in enumerate([(*REPRO, "pretrain"), by_hand]):
        alone = ("taskset", "--cpu-list", ",".join(map(str, cores_of(node))))
        running.append(start(trees[node], *alone, *command, MLFLOW_TRACKING_URI=NO_SERVER))
    return running


def finish_both(trees: Sequence[Path], port: int) -> str:
    """The same command on both, to the end; what node 0 says."""
    for tree, process in zip(trees, start_both(trees, port), strict=True):
        assert process.wait(HANG_SECONDS) == 0, output_of(tree)[-3000:]
    return output_of(trees[0])


def node_lost(bench: Bench, row: Row) -> None:
    """kill -9 of all that runs on one of two nodes, in mid-training; then the same command on both"""
    for lost in (1, 0):
        trees, port = checkouts(bench, f"node-{lost}-lost"), free_port()
        left = trees[1 - lost]
        with in_sheet(trees[0], engine(port)):
            running = start_both(trees, port)
            wait_for(partial(checkpoint_of, trees[0]), running[0], trees[0])
            row.tried += 1
            row.lost.append(time.time() - last_saved(trees[0]))
            kill_everything(trees[lost])
            assert running[1 - lost].wait(HANG_SECONDS) != 0
            assert "Traceback" not in output_of(left), output_of(left)[-3000:]
            row.message = row.message or line_with("the same command on every node continues", output_of(left))
            wait_until_idle(left, END_SECONDS, mirrors=False)
            line_with("continues after step", finish_both(trees, port))
        bench.finish(trees[0], row)
        row.survived += 1


def port_taken(bench: Bench, row: Row) -> None:
    """another program listens on the port at which two nodes are to meet; then it does not"""
    trees = checkouts(bench, "port-taken")
    with socket.create_server(("127.0.0.1", 0)) as other:
        port = other.getsockname()[1]
        with in_sheet(trees[0], engine(port)):
            row.tried += 1
            row.message = refuses(trees[0], "cannot listen on .*another engine.master_port", *REPRO, "pretrain")
    with in_sheet(trees[0], engine(port)):
        finish_both(trees, port)
    bench.finish(trees[0], row)
    row.survived += 1


def half_a_checkpoint(bench: Bench, row: Row) -> None:
    """both nodes are killed, and the checkpoint comes to one of them by half, as from a copy that was cut short"""
    trees, port = checkouts(bench, "half-a-checkpoint"), free_port()
    with in_sheet(trees[0], engine(port)):
        running = start_both(trees, port)
        wait_for(lambda: checkpoint_of(trees[0]), running[0], trees[0])
        row.tried += 1
        for tree in trees:
            kill_everything(tree)
        (index,) = trees[0].glob(".runs/resume/*/teacher.json")
        copy = (trees[1] / index.relative_to(trees[0])).parent.with_name(f"{index.parent.name}-node1")
        shutil.copytree(index.parent, copy, dirs_exist_ok=True)
        truncate(next(copy.glob("teacher-*.pt")), bench.random("half-a-checkpoint"))
        row.message = line_with("continues after step", finish_both(trees, port))
    bench.finish(trees[0], row)
    row.survived += 1
