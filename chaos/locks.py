"""Locks of DVC, and two commands at once."""

import json
import os
import re
import subprocess
import sys

import psutil

from chaos.bench import Bench, Row, remove_results
from chaos.commands import (
    HANG_SECONDS,
    REPRO,
    RWLOCK,
    is_running,
    line_with,
    output_of,
    processes_of,
    refuses,
    stage_command,
    start,
    wait_for,
)
from stages.files.artifacts import sha256_of


def stale_lock(bench: Bench, row: Row) -> None:
    """locks of DVC that a killed dvc left: of a dead process, of a process id that is taken again, cut short"""
    tree = bench.copy("stale-lock")
    locked = tree / RWLOCK
    dead = subprocess.Popen([sys.executable, "-c", ""])
    dead.wait()
    for pid in (dead.pid, os.getpid()):
        row.tried += 1
        (tree / "metrics/evaluate.json").unlink()
        (tree / ".dvc/tmp/lock").write_text(f"{pid:>6}\n")
        holder = {"pid": pid, "cmd": "dvc repro"}
        locked.write_text(json.dumps({"write": {str(tree / "metrics/evaluate.json"): holder}}))
        if pid == os.getpid():
            row.message = refuses(tree, "busy|blocked", *REPRO)
            locked.unlink()  # as documented
        bench.finish(tree, row)
        row.survived += 1
    row.tried += 1
    locked.write_text("")
    refuses(tree, "RWLock-file .* corrupted", *REPRO)
    locked.unlink()
    bench.finish(tree, row)
    row.survived += 1


def two_at_once(bench: Bench, row: Row) -> None:
    """a second dvc repro while the first one runs"""
    tree = bench.copy("two-at-once")
    remove_results(tree, "evaluate")
    process = start(tree, *REPRO)
    wait_for(lambda: any(is_running(p, "stages.evaluate") for p in processes_of(tree)), process, tree)
    row.tried += 1
    second = subprocess.run(REPRO, cwd=tree, env=psutil.Process(process.pid).environ(), capture_output=True, text=True)
    assert second.returncode != 0 and "Traceback" not in second.stderr
    row.message = line_with("busy|lock", second.stderr)
    assert process.wait(HANG_SECONDS) == 0, output_of(tree)
    bench.compare(tree, row)
    ran = re.findall("Running stage '(.*)'", bench.finish(tree, row))
    assert ran == ["config"], f"ran again: {ran}"
    row.survived += 1


def same_work_at_once(bench: Bench, row: Row) -> None:
    """a run by hand of the settings that dvc repro trains in this moment"""
    tree = bench.copy("same-work-at-once")
    remove_results(tree, "pretrain")
    process = start(tree, *REPRO, "pretrain")
    row.tried += 1
    out = tree / "outputs/second"
    words = stage_command("pretrain", f"hydra.run.dir={out}")
    second = subprocess.run(words, cwd=tree, env=psutil.Process(process.pid).environ(), capture_output=True, text=True)
    assert process.wait(HANG_SECONDS) == 0, output_of(tree)
    assert second.returncode == 0 and "Traceback" not in second.stderr, second.stderr[-3000:]
    assert sha256_of(out / "artifacts/teacher") == bench.outs["artifacts/teacher"]
    row.message = line_with("another process is still running", second.stderr + output_of(tree))
    bench.finish(tree, row)
    row.survived += 1
