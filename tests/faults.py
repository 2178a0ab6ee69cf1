"""The fault test: breaks the tiny pipeline in every way below and holds what comes out against an undisturbed run.

    make chaos                                            # everything, about an hour on 2 cores
    python -m tests.faults --only rank_killed --seed 7    # one kind of fault; docs/faults.md stays as it is
    python -m tests.faults --kills 200

Every case works in a copy of a pipeline that ran undisturbed with the same settings, types what a user would type,
and asserts what the user sees and that every out ends with the same bytes. The whole run writes its
table to docs/faults.md. tests/test_pipeline.py runs the cheap cases once each.
"""

import argparse
import contextlib
import http.server
import json
import os
import random
import re
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path

import psutil
import yaml

from benchmarks.checkout import DVC, checkout, environment, outs_of
from benchmarks.table import ROOT
from stages.files.artifacts import sha256_of
from stages.tracking.identity import machine
from stages.tracking.records import unsent

REPRO = (*DVC, "repro")
RWLOCK = ".dvc/tmp/rwlock"
CHECKPOINT_SECONDS = 1
SIZES = {  # tiny's own steps end before a kill can land between two checkpoints
    "conf/common.yaml": {"checkpoint_every_seconds: 60": f"checkpoint_every_seconds: {CHECKPOINT_SECONDS}"},
    "conf/scale/tiny.yaml": {"{steps: 20,": "{steps: 40,", "{steps: 12,": "{steps: 24,", "{steps: 6,": "{steps: 12,"},
}
PATIENCE = 600  # seconds after which a command counts as hanging
STOP_SECONDS = 25  # a repro that was told to stop must have ended by then; torchrun gives up on a rank after 30
RANK_SECONDS = 20  # a stage that lost a rank must have ended by then
MIRROR_SECONDS = 240  # a mirror waits up to two minutes for another one


@dataclass
class Row:
    """One kind of fault as measured; a row of the table."""

    fault: str
    tried: int = 0
    survived: int = 0
    compared: int = 0  # how often all outs were compared with the undisturbed run's; any difference ends the case
    mended: int = 0  # how often a kill cut DVC's own writing short and the README's remedy was taken
    lost: list[float] = field(default_factory=list)  # seconds of work, by kill
    message: str = ""
    failure: str = ""


class Skipped(Exception):
    """This machine cannot produce the fault; the table says why."""


class Bench:
    """A pipeline that ran undisturbed, and copies of it to be broken."""

    def __init__(self, folder: Path, seed: int = 1, finished: Path | None = None):
        self.folder, self.seed = folder, seed
        words = ["git", "-C", str(ROOT), "describe", "--always", "--dirty"]
        self.commit = subprocess.run(words, capture_output=True, text=True).stdout.strip() or "unknown"
        self.stretch: float | None = None  # the longest in which nothing is saved: what a kill can cost
        self.tree = finished or self.undisturbed()
        self.outs = outs_of(self.tree)

    def undisturbed(self) -> Path:
        tree, self.stretch = self.fresh("undisturbed"), 0.0
        process = start(tree, *REPRO)
        while process.poll() is None:
            self.stretch = max(self.stretch, time.time() - last_saved(tree))
            time.sleep(0.25)
        assert process.returncode == 0, said(tree)
        await_end(tree, MIRROR_SECONDS)
        return tree

    def random(self, name: str) -> random.Random:
        return random.Random(f"{self.seed}/{name}")

    def fresh(self, name: str) -> Path:
        """A clone in which nothing has run."""
        return checkout(self.folder / name, "tiny", SIZES)

    def copy(self, name: str) -> Path:
        """A copy of the finished pipeline, with nothing in the background."""
        skip = shutil.ignore_patterns(".runs", "mlflow.db*", "mlartifacts", "site")
        return shutil.copytree(self.tree, self.folder / name, ignore=skip)

    def compare(self, tree: Path, row: Row) -> None:
        outs = outs_of(tree)
        assert outs.keys() == self.outs.keys()
        different = [path for path, digest in outs.items() if digest != self.outs[path]]
        assert not different, f"bytes differ: {', '.join(different)}"
        row.compared += 1

    def finish(self, tree: Path, row: Row) -> str:
        """`dvc repro` to the end, then the comparison; returns what it said."""
        text = succeeds(tree, *REPRO)
        self.compare(tree, row)
        return text


# ---- what a user types, and what is left running


def start(tree: Path, *command: str, **variables: str) -> subprocess.Popen:
    """The command in a session of its own; what it says goes to a file, which a mirror may hold open for longer."""
    inherited = environment(PYTHONPATH=str(tree), DVC_SITE_CACHE_DIR=str(tree / ".dvc/site"))
    inherited.pop("MLFLOW_TRACKING_URI", None)
    with log_of(tree).open("wb") as log:
        return subprocess.Popen(
            command, cwd=tree, env=inherited | variables, start_new_session=True,
            stdin=subprocess.DEVNULL, stdout=log, stderr=subprocess.STDOUT,
        )  # fmt: skip


def log_of(tree: Path) -> Path:
    return tree.with_name(f"{tree.name}.log")


def said(tree: Path) -> str:
    return log_of(tree).read_text(errors="replace")


def succeeds(tree: Path, *command: str, **variables: str) -> str:
    code = start(tree, *command, **variables).wait(PATIENCE)
    assert code == 0, f"{' '.join(command[1:])} ended with code {code}:\n{said(tree)[-3000:]}"
    return said(tree)


def refuses(tree: Path, told: str, *command: str, **variables: str) -> str:
    """The command fails with a line that says `told`, and with no traceback; returns that line."""
    code = start(tree, *command, **variables).wait(PATIENCE)
    text = said(tree)
    assert code != 0, f"{' '.join(command[1:])} went on:\n{text[-3000:]}"
    assert "Traceback" not in text, text[-3000:]
    return line_with(told, text)


def by_hand(stage: str, *words: str) -> tuple[str, ...]:
    return (sys.executable, "-m", f"stages.{stage}", *words)


def line_with(told: str, text: str) -> str:
    found = next((line for line in re.split(r"[\r\n]+", text) if re.search(told, line)), None)
    assert found, f"nothing said {told!r}:\n{text[-3000:]}"
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


def await_end(tree: Path, seconds: float, mirrors: bool = True) -> None:
    """Nothing that worked in the copy is left; a mirror, which outlives its stage on purpose, may count or not."""
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


def until(condition: Callable[[], object], process: subprocess.Popen, tree: Path) -> None:
    """Waits for a condition that must come true while the process runs."""
    deadline = time.monotonic() + PATIENCE
    while not condition():
        assert process.poll() is None and time.monotonic() < deadline, f"too late:\n{said(tree)[-3000:]}"
        time.sleep(0.05)


def checkpoint_of(tree: Path, fit: str = "teacher") -> Path | None:
    return next(tree.glob(f".runs/resume/*/{fit}.json"), None)


NOT_PROGRESS = ("job.json", "ranks.log", "ranks.lock", "steps.jsonl", "result.json", "error.txt", "lock", "data")


def last_saved(tree: Path) -> float:
    """When something was last kept: a finished stage, a checkpoint, scores; or the running stage's own start."""
    times = []
    for path in [tree / "dvc.lock", *tree.glob(".runs/resume/*/[!.]*"), *tree.glob(".runs/resume/*/data/[!.]*")]:
        if path.suffix != ".pt" and path.name not in NOT_PROGRESS:  # a checkpoint counts from its index on
            with contextlib.suppress(FileNotFoundError):  # finished in this moment
                times.append(path.stat().st_mtime)
    for process in processes_of(tree):
        with contextlib.suppress(psutil.Error):
            _, flag, module, *_ = [*process.cmdline(), "", "", ""]
            if flag == "-m" and module not in ("stages.training.launchers.torchrun", "stages.tracking"):
                times.append(process.create_time())  # dvc, or the stage that it runs
    return max(times, default=time.time())


# ---- kills


def interrupted(bench: Bench, row: Row, name: str, kills: int, strike: Callable, *stages: str) -> None:
    """`dvc repro` of all stages (or these) again and again, struck at random moments until all strikes were made."""
    rng = bench.random(name)
    tree = bench.copy(name)
    forget(tree, *stages)
    committed = (tree / "dvc.lock").read_bytes()
    while row.survived < kills:
        process = start(tree, *REPRO)
        # half of the blows land in start-up, short stages and DVC's own work, half in training
        moment = rng.uniform(0.5, 9) if stages or rng.random() < 0.5 else rng.uniform(9, 30)
        try:
            process.wait(moment if row.tried < kills else PATIENCE)
        except subprocess.TimeoutExpired:
            row.tried += 1
            row.lost.append(time.time() - last_saved(tree))
            strike(tree, process)
            process.wait(STOP_SECONDS)
            await_end(tree, 15, mirrors=False)
            remember(row, said(tree))
            continue
        if process.returncode and mended(tree, committed):
            row.mended += 1
            continue
        assert process.returncode == 0, f"an undisturbed repro failed:\n{said(tree)[-3000:]}"
        remember(row, said(tree))
        bench.compare(tree, row)
        row.survived = row.tried
        if row.tried < kills:
            forget(tree, *stages)
    row.message = row.message or "the next dvc repro goes on"
    if bench.stretch is not None:
        bound = CHECKPOINT_SECONDS + 2 * bench.stretch  # twice: the machine may be shared
        assert max(row.lost) <= bound, f"{max(row.lost):.0f} s of work lost, more than {bound:.0f} s"
    succeeds(tree, *by_hand("tracking", "sync"))
    assert not unsent(tree)
    await_end(tree, MIRROR_SECONDS)


def mended(tree: Path, committed: bytes) -> bool:
    """Whether a blow cut DVC's own writing short, for DVC truncates, then writes; if so, mended as the README says."""
    if "RWLock-file" in said(tree):
        (tree / RWLOCK).unlink()
    elif not (tree / "dvc.lock").read_bytes().endswith(b"\n"):
        (tree / "dvc.lock").write_bytes(committed)
    else:
        return False
    return True


def forget(tree: Path, *stages: str) -> None:
    """These stages, or all, must run again: DVC has no memory of their results to restore."""
    lock = yaml.safe_load((tree / "dvc.lock").read_text())
    for stage in stages or list(lock["stages"]):
        for out in lock["stages"].pop(stage)["outs"]:
            path = tree / out["path"]
            shutil.rmtree(path) if path.is_dir() else path.unlink()
    (tree / "dvc.lock").write_text(yaml.safe_dump(lock, sort_keys=False))
    shutil.rmtree(tree / ".dvc/cache/runs", ignore_errors=True)


def remember(row: Row, text: str) -> None:
    """The line that says most about an interruption."""
    for told in ("interrupted (after|while)", "continues after step", "the same command continues"):
        if found := re.search(f".*{told}.*", text):
            row.message = found[0].strip()
        if re.search(told, row.message):
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


def training(tree: Path) -> subprocess.Popen:
    """pretrain under DVC, from nothing to its first checkpoint."""
    forget(tree, "pretrain")
    process = start(tree, *REPRO, "pretrain")
    until(lambda: checkpoint_of(tree), process, tree)
    return process


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
        assert process.wait(PATIENCE) != 0
        slowest = max(slowest, time.monotonic() - killed)
        assert slowest < RANK_SECONDS, f"the stage ended {slowest:.0f} s after its rank"
        await_end(tree, 10, mirrors=False)
        assert "Traceback" not in said(tree)
        line = line_with(f"rank {victim} was killed", said(tree))
        line_with("continues after step", bench.finish(tree, row))
        row.survived += 1
    row.message = f"after {slowest:.1f} s: {line}"


# ---- disks


@contextlib.contextmanager
def mounted(folder: Path, *words: str) -> Iterator[None]:
    done = subprocess.run(["mount", *words, str(folder)], capture_output=True, text=True)
    if done.returncode:
        raise Skipped("mount is not permitted here (it needs root)")
    try:
        yield
    finally:
        subprocess.run(["umount", "--lazy", str(folder)], check=True)


def fill(folder: Path) -> Path:
    ballast = folder / "ballast"
    with contextlib.suppress(OSError), ballast.open("wb", buffering=0) as file:
        while file.write(bytes(4096)):
            pass
    return ballast


def disk_full_checkpoint(bench: Bench, row: Row) -> None:
    """the disk fills up between two checkpoints (a tmpfs of 32 MB)"""
    tree = bench.copy("disk-full-checkpoint")
    (tree / ".runs/resume").mkdir(parents=True)
    with mounted(tree / ".runs/resume", "-t", "tmpfs", "-o", "size=32m", "tmpfs"):
        process = training(tree)
        row.tried += 1
        ballast = fill(tree / ".runs/resume")
        code = process.wait(PATIENCE)
        assert "Traceback" not in said(tree), said(tree)[-3000:]
        row.message = line_with("could not be written", said(tree))
        if code != 0:
            assert checkpoint_of(tree), "the checkpoint before is gone"
            ballast.unlink()
            line_with("continues after step", bench.finish(tree, row))
        else:
            bench.finish(tree, row)
        await_end(tree, MIRROR_SECONDS)
    row.survived += 1


def disk_full_out(bench: Bench, row: Row) -> None:
    """the disk fills up while shards are written (a tmpfs of 512 KB)"""
    tree = bench.copy("disk-full-out")
    place = tree / "outputs/small"
    place.mkdir(parents=True)
    with mounted(place, "-t", "tmpfs", "-o", "size=512k", "tmpfs"):
        row.tried += 1
        words = by_hand("prepare", f"hydra.run.dir={place}")
        row.message = refuses(tree, "No space left", *words, MLFLOW_TRACKING_URI=CLOSED)
        assert not (place / "artifacts/data/card.json").exists(), "a folder that is not whole has a card"
    succeeds(tree, *by_hand("prepare", f"hydra.run.dir={place}"), MLFLOW_TRACKING_URI=CLOSED)
    assert sha256_of(place / "artifacts/data") == bench.outs["artifacts/data"]
    row.compared += 1
    row.survived += 1


def read_only(bench: Bench, row: Row) -> None:
    """the artifact folder is read-only"""
    tree = bench.copy("read-only")
    for stage in ("prepare", "pretrain"):
        with mounted(tree / "artifacts", "--bind", str(tree / "artifacts")):
            subprocess.run(["mount", "-o", "remount,bind,ro", str(tree / "artifacts")], check=True)
            row.tried += 1
            line = refuses(tree, "Read-only", *by_hand(stage), DVC_STAGE=stage, MLFLOW_TRACKING_URI=CLOSED)
            refuses(tree, "Read-only", *REPRO, "-f", "-s", stage)
        row.message = row.message or line
        bench.finish(tree, row)
        row.survived += 1


def cache_full(bench: Bench, row: Row) -> None:
    """DVC's cache is full when it saves a trained model (a tmpfs of 1 MB)"""
    tree = bench.copy("cache-full")
    forget(tree, "pretrain")
    cache = tree / "small-cache"
    cache.mkdir()
    with mounted(cache, "-t", "tmpfs", "-o", "size=1m", "tmpfs"):
        succeeds(tree, *DVC, "config", "--local", "cache.dir", str(cache))
        row.tried += 1
        row.message = refuses(tree, "No space left", *REPRO, "-s", "pretrain")
        subprocess.run(["mount", "-o", "remount,size=100m", str(cache)], check=True)
        line_with(r"teacher: continues after step (\d+) of \1", succeeds(tree, *REPRO, "-s", "pretrain"))
    (tree / ".dvc/config.local").unlink()
    bench.finish(tree, row)
    row.survived += 1


# ---- damage


def truncate(path: Path, rng: random.Random) -> None:
    path.write_bytes(path.read_bytes()[: rng.randrange(path.stat().st_size)])


def flip_a_bit(path: Path, rng: random.Random) -> None:
    content = bytearray(path.read_bytes())
    content[rng.randrange(len(content))] ^= 1 << rng.randrange(8)
    path.write_bytes(content)


def damaged(bench: Bench, row: Row, path: str, reader: str | None) -> None:
    """A stage by hand refuses the file by name; `dvc repro` brings it back."""
    name = f"damaged-{path.replace('/', '-')}"
    tree, rng = bench.copy(name), bench.random(name)
    for harm in (truncate, flip_a_bit):
        row.tried += 1
        harm(tree / path, rng)
        if reader:
            row.message = refuses(tree, re.escape(path), *by_hand(reader), MLFLOW_TRACKING_URI=CLOSED)
        text = bench.finish(tree, row)
        row.message = row.message or line_with("checking out outputs|Running stage", text)
        row.survived += 1


def damaged_shard(bench: Bench, row: Row) -> None:
    """a token shard, truncated and with one bit flipped"""
    damaged(bench, row, "artifacts/data/train-00000.bin", "pretrain")


def damaged_test_shard(bench: Bench, row: Row) -> None:
    """a token shard of the test split, the same"""
    damaged(bench, row, "artifacts/data/test-00000.bin", "evaluate")


def damaged_tokenizer(bench: Bench, row: Row) -> None:
    """the tokenizer, the same"""
    damaged(bench, row, "artifacts/data/tokenizer.json", "evaluate")


def damaged_card(bench: Bench, row: Row) -> None:
    """the corpus card, the same"""
    damaged(bench, row, "artifacts/data/card.json", "evaluate")


def damaged_weights(bench: Bench, row: Row) -> None:
    """a model's safetensors, the same"""
    damaged(bench, row, "artifacts/teacher/model.safetensors", "evaluate")


def damaged_config(bench: Bench, row: Row) -> None:
    """a model's config.json, the same"""
    damaged(bench, row, "artifacts/teacher/config.json", "evaluate")


def damaged_metrics(bench: Bench, row: Row) -> None:
    """a metrics file, the same"""
    damaged(bench, row, "metrics/evaluate.json", "report")


def damaged_curve(bench: Bench, row: Row) -> None:
    """a training curve (CSV), the same"""
    damaged(bench, row, "plots/pretrain/teacher.csv", "report")


def damaged_scores(bench: Bench, row: Row) -> None:
    """a score table, the same (only DVC reads it)"""
    damaged(bench, row, "artifacts/scores/teacher.npy", None)


def damaged_checkpoint(bench: Bench, row: Row) -> None:
    """a training checkpoint and its index, the same; then dvc repro"""
    for part in ("teacher-*.pt", "teacher.json"):
        for harm in (truncate, flip_a_bit):
            name = f"damaged-checkpoint-{row.tried}"
            tree = bench.copy(name)
            training(tree)
            kill_everything(tree)
            row.tried += 1
            harm(next(tree.glob(f".runs/resume/*/{part}")), bench.random(name))
            row.message = line_with("is damaged .* its work is done again", bench.finish(tree, row))
            row.survived += 1


def damaged_progress(bench: Bench, row: Row) -> None:
    """what evaluate and prepare saved of unfinished work, the same; then dvc repro"""
    for stage, part in (("evaluate", "sums"), ("prepare", "tokenizer.json")):
        for harm in (truncate, flip_a_bit):
            name = f"damaged-{part}-{harm.__name__}"
            tree = bench.copy(name)
            forget(tree, stage)
            process = start(tree, *REPRO, stage)
            until(lambda tree=tree, at=f".runs/resume/{stage}-*/{part}": list(tree.glob(at)), process, tree)
            kill_everything(tree)
            row.tried += 1
            harm(next(tree.glob(f".runs/resume/{stage}-*/{part}")), bench.random(name))
            row.message = line_with("is damaged: what it held is done again", bench.finish(tree, row))
            row.survived += 1


def damaged_lock(bench: Bench, row: Row) -> None:
    """dvc.lock, truncated; where DVC cannot read it or go on from it, the user gets it back from git"""
    tree, rng = bench.copy("damaged-lock"), bench.random("damaged-lock")
    committed = (tree / "dvc.lock").read_bytes()
    for _ in range(3):
        row.tried += 1
        truncate(tree / "dvc.lock", rng)
        if start(tree, *REPRO).wait(PATIENCE):
            row.message = line_with("dvc.lock|failed to reproduce", said(tree))
            (tree / "dvc.lock").write_bytes(committed)
        bench.finish(tree, row)
        row.survived += 1


def damaged_settings(bench: Bench, row: Row) -> None:
    """resolved.yaml, truncated and with one bit flipped"""
    damaged(bench, row, "resolved.yaml", None)


OUTS = ("artifacts/teacher", "metrics/pretrain.json", "artifacts/data/train-00000.bin", "artifacts/scores")


def out_removed(bench: Bench, row: Row, paths: tuple = OUTS) -> None:
    """an out is removed by hand"""
    tree = bench.copy("out-removed")
    for path in paths:
        row.tried += 1
        shutil.rmtree(tree / path) if (tree / path).is_dir() else (tree / path).unlink()
        row.message = line_with("checking out outputs|Running stage", bench.finish(tree, row))
        row.survived += 1


# ---- locks


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
            locked.unlink()  # as the README says
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
    forget(tree, "evaluate")
    process = start(tree, *REPRO)
    until(lambda: any(is_running(p, "stages.evaluate") for p in processes_of(tree)), process, tree)
    row.tried += 1
    second = subprocess.run(REPRO, cwd=tree, env=psutil.Process(process.pid).environ(), capture_output=True, text=True)
    assert second.returncode != 0 and "Traceback" not in second.stderr
    row.message = line_with("busy|lock", second.stderr)
    assert process.wait(PATIENCE) == 0, said(tree)
    bench.compare(tree, row)
    ran = re.findall("Running stage '(.*)'", bench.finish(tree, row))
    assert ran == ["config"], f"ran again: {ran}"
    row.survived += 1


def same_work_at_once(bench: Bench, row: Row) -> None:
    """a run by hand of the settings that dvc repro trains in this moment"""
    tree = bench.copy("same-work-at-once")
    process = training(tree)
    row.tried += 1
    out = tree / "outputs/second"
    words = by_hand("pretrain", f"hydra.run.dir={out}")
    second = subprocess.run(words, cwd=tree, env=psutil.Process(process.pid).environ(), capture_output=True, text=True)
    assert "Traceback" not in second.stderr
    row.message = line_with("another process is still running", second.stderr)
    assert process.wait(PATIENCE) == 0, said(tree)
    if second.returncode == 0:  # it waited, and then did the work itself
        assert sha256_of(out / "artifacts/teacher") == bench.outs["artifacts/teacher"]
    bench.finish(tree, row)
    row.survived += 1


# ---- numbers that are not finite


def nan_weights(bench: Bench, row: Row, readers: tuple = ("evaluate", "distill")) -> None:
    """a NaN in a model's weights, with hashes that match"""
    import safetensors.torch

    tree = bench.copy("nan-weights")
    folder = tree / "artifacts/teacher"
    tensors = safetensors.torch.load_file(folder / "model.safetensors")
    tensors["model.norm.weight"][0] = float("nan")
    safetensors.torch.save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((folder / "config.json").read_text())
    config.pop("config_sha256")
    config["weights_sha256"] = sha256_of(folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps(config))
    for reader in readers:
        row.tried += 1
        out = tree / f"outputs/{reader}"
        words = by_hand(reader, f"hydra.run.dir={out}")
        row.message = refuses(tree, "model.norm.weight holds a non-finite number", *words, MLFLOW_TRACKING_URI=CLOSED)
        assert not list(out.glob("artifacts/**/*")) and not list(out.glob("metrics/*"))
        row.survived += 1
    bench.finish(tree, row)


def nonfinite_gradients(bench: Bench, row: Row) -> None:
    """gradients that overflow (learning rate 1e9)"""
    tree = bench.copy("nonfinite-gradients")
    row.tried += 1
    words = by_hand("pretrain", "optimizer.adamw_learning_rate=1e9", f"hydra.run.dir={tree / 'outputs/broken'}")
    row.message = refuses(tree, "not finite at step", *words, MLFLOW_TRACKING_URI=CLOSED)
    assert not list((tree / "outputs/broken").glob("artifacts/**/*.safetensors"))
    bench.finish(tree, row)
    row.survived += 1


# ---- MLflow


CLOSED = "http://127.0.0.1:9"  # the discard port: nothing listens
STAGES = ("prepare", "evaluate", "report")


def seconds_of(tree: Path, **variables: str) -> float:
    began = time.monotonic()
    succeeds(tree, *REPRO, "-f", "-s", *STAGES, **variables)
    return time.monotonic() - began


def recorded(bench: Bench, row: Row, name: str, uri: str, told: str | None) -> Path:
    """Three stages against a server that fails: nothing waits for it, and the record goes out once, later."""
    tree = bench.copy(name)
    plain = seconds_of(tree)
    await_end(tree, MIRROR_SECONDS)
    row.tried += 1
    added = seconds_of(tree, MLFLOW_TRACKING_URI=uri) - plain
    bench.compare(tree, row)
    assert added < 10 + plain / 2, f"{added:.0f} s more than {plain:.0f} s without the server"
    await_end(tree, MIRROR_SECONDS)
    if told:
        row.message = f"{added:+.1f} s on {plain:.1f} s: {line_with(told, said(tree))}"
    return tree


def sent_once(tree: Path, uri: str | None, records: int) -> None:
    """`sync` sends what is left, and the store then has every record as one run."""
    variables = {"MLFLOW_TRACKING_URI": uri} if uri else {}
    succeeds(tree, *by_hand("tracking", "sync"), **variables)
    assert not unsent(tree)
    import mlflow

    client = mlflow.MlflowClient(uri or f"sqlite:///{tree / 'mlflow.db'}")
    runs = client.search_runs([client.get_experiment_by_name("offramp").experiment_id], max_results=1000)
    names = [run.data.tags["offramp.record"] for run in runs if "offramp.record" in run.data.tags]
    assert len(names) == len(set(names)) == records, f"{len(names)} runs of {len(set(names))} records, not {records}"


def mlflow_unreachable(bench: Bench, row: Row) -> None:
    """no MLflow server listens"""
    tree = recorded(bench, row, "mlflow-unreachable", CLOSED, "was not reached")
    sent_once(tree, None, 2 * len(STAGES))
    row.survived += 1


class Slow(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        time.sleep(10)
        with contextlib.suppress(OSError):  # the client has gone
            self.send_response(200)
            self.end_headers()

    do_POST = do_GET

    def log_message(self, *_):
        pass


def mlflow_slow(bench: Bench, row: Row) -> None:
    """an MLflow server that takes 10 s for each answer"""
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Slow) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        tree = recorded(bench, row, "mlflow-slow", f"http://127.0.0.1:{server.server_port}", "was not reached")
        server.shutdown()
    sent_once(tree, None, 2 * len(STAGES))
    row.survived += 1


@contextlib.contextmanager
def mlflow_server(folder: Path, port: int) -> Iterator[subprocess.Popen]:
    words = [sys.executable, "-m", "mlflow", "server", "--host", "127.0.0.1", "--port", str(port), "--workers", "1"]
    words += ["--backend-store-uri", f"sqlite:///{folder / 'served.db'}", "--artifacts-destination", str(folder / "to")]
    variables = environment(MLFLOW_SERVER_ENABLE_JOB_EXECUTION="false")
    folder.mkdir(exist_ok=True)
    with (folder / "server.log").open("ab") as log:
        server = subprocess.Popen(
            words, cwd=folder, env=variables, stdout=log, stderr=log, start_new_session=True
        )
    try:
        deadline = time.monotonic() + 120
        while True:
            assert server.poll() is None and time.monotonic() < deadline, (folder / "server.log").read_text()[-2000:]
            with contextlib.suppress(OSError):
                socket.create_connection(("127.0.0.1", port), timeout=1).close()
                break
            time.sleep(0.3)
        yield server
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(server.pid, signal.SIGKILL)
        server.wait()


def mlflow_dies(bench: Bench, row: Row) -> None:
    """a real MLflow server is killed while it receives a run, and comes back later"""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    uri, store = f"http://127.0.0.1:{port}", bench.folder / "mlflow-server"
    tree = bench.copy("mlflow-dies")
    with mlflow_server(store, port) as server:
        process = start(tree, *REPRO, "-f", "-s", *STAGES, MLFLOW_TRACKING_URI=uri)
        until(lambda: list(tree.glob(".runs/tracking/*/sent.json")), process, tree)  # the first run is on its way
        row.tried += 1
        os.killpg(server.pid, signal.SIGKILL)
        assert process.wait(PATIENCE) == 0, said(tree)
    bench.compare(tree, row)
    await_end(tree, MIRROR_SECONDS)
    row.message = line_with("was not reached", said(tree))
    with mlflow_server(store, port):
        sent_once(tree, uri, len(STAGES))
    row.survived += 1


# ---- all of them


KILLS = {kill9_group: 0.40, kill9_everything: 0.28, terminated: 0.16, ctrl_c: 0.16}  # shares of --kills
CASES: list[Callable] = [
    *KILLS, rank_killed, disk_full_checkpoint, disk_full_out, read_only, cache_full,
    damaged_shard, damaged_test_shard, damaged_tokenizer, damaged_card, damaged_weights, damaged_config,
    damaged_metrics, damaged_curve, damaged_scores, damaged_checkpoint, damaged_progress, damaged_lock,
    damaged_settings, out_removed, stale_lock, two_at_once, same_work_at_once, nan_weights, nonfinite_gradients,
    mlflow_unreachable, mlflow_slow, mlflow_dies,
]  # fmt: skip


def run(bench: Bench, case: Callable, **how) -> Row:
    """One case; a failed one is told in its row, a skipped one says why. Nothing of it stays."""
    row = Row(case.__doc__)
    try:
        case(bench, row, **how)
    except Skipped as reason:
        row.message = f"not tried: {reason}"
    except Exception as error:
        row.failure = f"{type(error).__name__}: {error}"
    finally:
        for tree in set(bench.folder.iterdir()) - {bench.tree}:
            if tree.is_dir():
                kill_everything(tree)
                shutil.rmtree(tree, ignore_errors=True)
    return row


def table(rows: list[Row], folder: Path) -> str:
    lines = ["| fault | tried | survived | bytes equal | work lost, worst | what the user sees |"]
    lines.append("| --- | ---: | ---: | ---: | ---: | --- |")
    for row in rows:
        lost = f"{max(row.lost):.1f} s" if row.lost else ""
        words = " ".join((row.failure or row.message).replace("|", "\\|").split())
        words = re.sub(re.escape(str(folder)) + r"/[^/\s]+/", "", words)
        words = words if len(words) <= 200 else words[:197] + "..."
        equal = f"{row.compared} of {row.compared}" if row.compared else ""
        lines.append(f"| {row.fault} | {row.tried} | {row.survived} | {equal} | {lost} | {words} |")
    return "\n".join(lines)


def page(bench: Bench, rows: list[Row], seconds: float) -> str:
    box = machine()
    tools = ", ".join(f"{name} {version(name)}" for name in ("torch", "lightning", "dvc", "mlflow"))
    kills = sum(row.tried for row in rows if row.lost)
    remedies = sum(row.mended for row in rows)
    return f"""# Fault test

Written by `make chaos` (`python -m tests.faults --seed {bench.seed}`); `make test` runs a short form.

The tiny pipeline is broken in {len(rows)} ways, {kills} times by killing it. After each fault, `dvc repro` goes on, and
every out, by SHA-256, and `dvc.lock` are compared with those of a run that nothing disturbed. A case fails where a
byte differs, a process is left behind, a traceback is shown, or nothing says what is wrong.

{table(rows, bench.folder)}

- **tried, survived**: faults made, and those after which everything was as it should be.
- **bytes equal**: comparisons of all outs with the undisturbed run. A kill case compares when its pipeline ends.
- Kills that cut DVC's own writing short, of `dvc.lock` or of `.dvc/tmp/rwlock`, so that it refused the file until the
  README's remedy was taken: {remedies}.
- **work lost**: from the latest save (checkpoint, scores, finished stage), or the start of the stage where it had
  saved nothing yet, to the kill; the worst of the case. Checkpoints were {CHECKPOINT_SECONDS} s apart here (60 s by
  default). The longest stretch without a save in the undisturbed run, a stage's start-up, was {bench.stretch:.1f} s.
- **what the user sees**: the line as shown, without the path of the copy, cut at 200 characters.

Machine: {box["machine.cores"]} cores, {box["machine.processor"]}, accelerator {box["machine.accelerator"]}. Python
{box["machine.python"]}, {tools}.
Commit {bench.commit}, seed {bench.seed}, {seconds / 60:.0f} minutes.
"""


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.faults", description=__doc__.splitlines()[0])
    parser.add_argument("--seed", type=int, default=1, help="of the moments and places of the faults")
    names = [case.__name__ for case in CASES]
    parser.add_argument("--only", choices=names, action="append", metavar="NAME", help=f"one of {', '.join(names)}")
    parser.add_argument("--kills", type=int, default=50, help="of whole process groups, over all kill cases")
    options = parser.parse_args()
    began, rows = time.monotonic(), []
    with tempfile.TemporaryDirectory(prefix="offramp-faults-") as folder:
        print("the undisturbed run comes first", flush=True)
        bench = Bench(Path(folder).resolve(), options.seed)
        for case in CASES:
            if options.only and case.__name__ not in options.only:
                continue
            how = {"kills": max(1, round(options.kills * KILLS[case]))} if case in KILLS else {}
            rows.append(run(bench, case, **how))
            told = rows[-1].failure or rows[-1].message
            print(f"{case.__name__}: {rows[-1].survived} of {rows[-1].tried}  {told}", flush=True)
        print(f"\n{table(rows, bench.folder)}")
        if not options.only:
            (ROOT / "docs").mkdir(exist_ok=True)
            (ROOT / "docs/faults.md").write_text(page(bench, rows, time.monotonic() - began))
    return any(row.failure for row in rows)


if __name__ == "__main__":
    sys.exit(main())
