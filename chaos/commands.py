"""The commands that a user would type in a copy of the pipeline, and the processes that they leave behind."""

import contextlib
import re
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import psutil

from benchmarks.checkout import DVC, environment
from stages.files.artifacts import read_json

REPRO = (*DVC, "repro")
RWLOCK = ".dvc/tmp/rwlock"
NO_SERVER = "http://127.0.0.1:9"  # the discard port: nothing listens
HANG_SECONDS = 600  # a command that takes longer counts as hanging
MIRROR_SECONDS = 240  # a mirror waits up to two minutes for another one


def start(tree: Path, *command: str, **variables: str) -> subprocess.Popen:
    """The command in a session of its own; its output goes to a file, which a mirror may hold open for longer."""
    inherited = environment(PYTHONPATH=str(tree), DVC_SITE_CACHE_DIR=str(tree / ".dvc/site"))
    inherited.pop("MLFLOW_TRACKING_URI", None)
    with log_path(tree).open("wb") as log:
        return subprocess.Popen(
            command, cwd=tree, env=inherited | variables, start_new_session=True,
            stdin=subprocess.DEVNULL, stdout=log, stderr=subprocess.STDOUT,
        )  # fmt: skip


def log_path(tree: Path) -> Path:
    return tree.with_name(f"{tree.name}.log")


def output_of(tree: Path) -> str:
    return log_path(tree).read_text(errors="replace")


def succeeds(tree: Path, *command: str, **variables: str) -> str:
    code = start(tree, *command, **variables).wait(HANG_SECONDS)
    assert code == 0, f"{' '.join(command[1:])} ended with code {code}:\n{output_of(tree)[-3000:]}"
    return output_of(tree)


def refuses(tree: Path, pattern: str, *command: str, **variables: str) -> str:
    """The command fails with a line that matches `pattern`, and with no traceback; returns that line."""
    code = start(tree, *command, **variables).wait(HANG_SECONDS)
    text = output_of(tree)
    assert code != 0, f"{' '.join(command[1:])} did not fail:\n{text[-3000:]}"
    assert "Traceback" not in text, text[-3000:]
    return line_with(pattern, text)


def stage_command(stage: str, *words: str) -> tuple[str, ...]:
    return (sys.executable, "-m", f"stages.{stage}", *words)


def line_with(pattern: str, text: str) -> str:
    found = next((line for line in re.split(r"[\r\n]+", text) if re.search(pattern, line)), None)
    assert found, f"no line matches {pattern!r}:\n{text[-3000:]}"
    return found.strip()


def processes_of(tree: Path) -> list[psutil.Process]:
    """Every live process that works in the copy, in whatever process group or session."""
    found = []
    for process in psutil.process_iter(["cwd", "status"]):
        cwd = process.info["cwd"]
        if cwd and Path(cwd).is_relative_to(tree) and process.info["status"] != psutil.STATUS_ZOMBIE:
            found.append(process)
    return found


def is_running(process: psutil.Process, module: str) -> bool:
    with contextlib.suppress(psutil.Error):
        return module in process.cmdline()
    return False


def wait_until_idle(tree: Path, seconds: float, mirrors: bool = True) -> None:
    """Nothing that worked in the copy is left; `mirrors` says whether mirrors, which outlive their stage, count."""
    deadline = time.monotonic() + seconds
    while True:
        left = [p for p in processes_of(tree) if mirrors or not is_running(p, "stages.tracking")]
        if not left:
            return
        if time.monotonic() > deadline:
            raise AssertionError(f"still running after {seconds} s: {[p.as_dict(['pid', 'cmdline']) for p in left]}")
        time.sleep(0.2)


def kill_everything(tree: Path) -> None:
    while left := processes_of(tree):
        for process in left:
            with contextlib.suppress(psutil.NoSuchProcess):
                process.kill()
        psutil.wait_procs(left, timeout=5)


def wait_for(condition: Callable[[], object], process: subprocess.Popen, tree: Path) -> None:
    """Waits for a condition that must come true while the process runs."""
    deadline = time.monotonic() + HANG_SECONDS
    while not condition():
        assert process.poll() is None and time.monotonic() < deadline, f"too late:\n{output_of(tree)[-3000:]}"
        time.sleep(0.05)


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as probe:
        return probe.getsockname()[1]


def checkpoint_of(tree: Path, fit: str = "teacher") -> Path | None:
    return next(tree.glob(f".runs/resume/*/{fit}.json"), None)


def is_in_parts(tree: Path) -> bool:
    """Is the latest checkpoint one that the ranks have shared out?"""
    index = checkpoint_of(tree)
    return index is not None and "parts" in read_json(index)


NOT_PROGRESS = (
    "job.json", "run.json", "ranks.log", "ranks.lock", "steps.jsonl", "result.json", "error.txt", "lock", "data",
)  # fmt: skip


def last_saved(tree: Path) -> float:
    """Time of the last save (a finished stage, a checkpoint, scores), or of the running stage's start."""
    times = []
    for path in [tree / "dvc.lock", *tree.glob(".runs/resume/*/[!.]*"), *tree.glob(".runs/resume/*/data/[!.]*")]:
        if path.suffix != ".pt" and path.name not in NOT_PROGRESS:  # a checkpoint counts from its index on
            with contextlib.suppress(FileNotFoundError):  # the stage ended in between
                times.append(path.stat().st_mtime)
    for process in processes_of(tree):
        with contextlib.suppress(psutil.Error):
            words: list[str] = [*process.cmdline(), "", "", ""]
            flag, module = words[1:3]
            if flag == "-m" and module not in ("stages.training.launchers.torchrun", "stages.tracking"):
                times.append(process.create_time())  # dvc, or the stage that it runs
    return max(times, default=time.time())
