"""Kills and signals, at random moments."""

import os
import re
import signal
import subprocess
import time
from collections.abc import Callable
from pathlib import Path

from chaos.bench import CHECKPOINT_SECONDS, Bench, Row, remove_results, training
from chaos.commands import (
    HANG_SECONDS,
    MIRROR_SECONDS,
    REPRO,
    RWLOCK,
    is_running,
    kill_everything,
    last_saved,
    line_with,
    output_of,
    processes_of,
    stage_command,
    start,
    succeeds,
    wait_until_idle,
)
from stages.tracking.records import unsent

RANK_SECONDS = 20  # a stage that lost a rank must have ended by then
STOP_SECONDS = 25  # a repro that got a signal must have ended by then; torchrun gives up on a rank after 30


def interrupted(bench: Bench, row: Row, name: str, kills: int, kill: Callable, *stages: str) -> None:
    """`dvc repro` of all stages (or these) again and again, interrupted at random moments until all kills were made."""
    rng = bench.random(name)
    tree = bench.copy(name)
    remove_results(tree, *stages)
    committed = (tree / "dvc.lock").read_bytes()
    while row.survived < kills:
        process = start(tree, *REPRO)
        # half of the kills fall in start-up, short stages and DVC's own work, half in training
        moment = rng.uniform(0.5, 9) if stages or rng.random() < 0.5 else rng.uniform(9, 30)
        try:
            process.wait(moment if row.tried < kills else HANG_SECONDS)
        except subprocess.TimeoutExpired:
            row.tried += 1
            row.lost.append(time.time() - last_saved(tree))
            kill(tree, process)
            process.wait(STOP_SECONDS)
            wait_until_idle(tree, 15, mirrors=False)
            keep_message(row, output_of(tree))
            continue
        if process.returncode and repaired(tree, committed):
            row.repaired += 1
            continue
        assert process.returncode == 0, f"an undisturbed repro failed:\n{output_of(tree)[-3000:]}"
        keep_message(row, output_of(tree))
        bench.compare(tree, row)
        row.survived = row.tried
        if row.tried < kills:
            remove_results(tree, *stages)
    row.message = row.message or "the next dvc repro goes on"
    if bench.longest_without_save is not None:
        bound = CHECKPOINT_SECONDS + 2 * bench.longest_without_save  # twice: the machine may be shared
        assert max(row.lost) <= bound, f"{max(row.lost):.0f} s of work lost, more than {bound:.0f} s"
    succeeds(tree, *stage_command("tracking", "sync"))
    assert not unsent(tree)
    wait_until_idle(tree, MIRROR_SECONDS)


def repaired(tree: Path, committed: bytes) -> bool:
    """True if a kill cut DVC's own writing short (DVC truncates, then writes); repairs it as documented."""
    if "RWLock-file" in output_of(tree):
        (tree / RWLOCK).unlink()
    elif not (tree / "dvc.lock").read_bytes().endswith(b"\n"):
        (tree / "dvc.lock").write_bytes(committed)
    else:
        return False
    return True


def keep_message(row: Row, text: str) -> None:
    """Keeps the line that says most about an interruption."""
    for pattern in ("interrupted (after|while)", "continues after step", "the same command continues"):
        if found := re.search(f".*{pattern}.*", text):
            row.message = found[0].strip()
        if re.search(pattern, row.message):
            return


def kill_group(tree: Path, process: subprocess.Popen) -> None:
    os.killpg(process.pid, signal.SIGKILL)


def kill9_group(bench: Bench, row: Row, kills: int) -> None:
    """kill -9 of dvc's process group; ranks are in sessions of their own and must end by themselves"""
    interrupted(bench, row, "kill9-group", kills, kill_group)


def kill9_everything(bench: Bench, row: Row, kills: int) -> None:
    """kill -9 of every process at once, ranks and mirror too, as a machine that is switched off"""
    interrupted(bench, row, "kill9-everything", kills, lambda tree, process: kill_everything(tree))


def terminated(bench: Bench, row: Row, kills: int) -> None:
    """SIGTERM to the process group, as a scheduler sends it"""
    interrupted(bench, row, "terminated", kills, lambda tree, process: os.killpg(process.pid, signal.SIGTERM))


def ctrl_c(bench: Bench, row: Row, kills: int) -> None:
    """SIGINT to the process group: Ctrl-C"""
    interrupted(bench, row, "ctrl-c", kills, lambda tree, process: os.killpg(process.pid, signal.SIGINT))


def kill9_prepare(bench: Bench, row: Row, kills: int) -> None:
    """kill -9 of dvc's process group during prepare alone (the short form)"""
    interrupted(bench, row, "kill9-prepare", kills, kill_group, "prepare")


def rank_killed(bench: Bench, row: Row) -> None:
    """kill -9 of one DDP rank in mid-training"""
    slowest = 0.0
    for victim in (0, 1):
        tree = bench.copy(f"rank-{victim}-killed")
        process = training(tree)
        row.tried += 1
        ranks = [p for p in processes_of(tree) if is_running(p, "stages.training.rank")]
        next(p for p in ranks if p.environ()["RANK"] == str(victim)).kill()
        row.lost.append(time.time() - last_saved(tree))
        killed = time.monotonic()
        assert process.wait(HANG_SECONDS) != 0
        slowest = max(slowest, time.monotonic() - killed)
        assert slowest < RANK_SECONDS, f"the stage ended {slowest:.0f} s after its rank"
        wait_until_idle(tree, 10, mirrors=False)
        assert "Traceback" not in output_of(tree)
        line = line_with(f"rank {victim} was killed", output_of(tree))
        line_with("continues after step", bench.finish(tree, row))
        row.survived += 1
    row.message = f"after {slowest:.1f} s: {line}"
