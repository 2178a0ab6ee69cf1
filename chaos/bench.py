"""A pipeline that ran undisturbed, the copies of it that get broken, and the result of one kind of fault."""

import contextlib
import random
import shutil
import subprocess
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import yaml

from benchmarks.checkout import checkout, outs_of
from benchmarks.table import ROOT
from chaos.commands import (
    MIRROR_SECONDS,
    REPRO,
    checkpoint_of,
    kill_everything,
    last_saved,
    output_of,
    start,
    succeeds,
    wait_for,
    wait_until_idle,
)

CHECKPOINT_SECONDS = 1
SIZES = {  # tiny's own steps end before a kill can land between two checkpoints
    "conf/base.yaml": {"checkpoint_every_seconds: 60": f"checkpoint_every_seconds: {CHECKPOINT_SECONDS}"},
    "conf/scale/tiny.yaml": {"{steps: 20,": "{steps: 40,", "{steps: 12,": "{steps: 24,", "{steps: 6,": "{steps: 12,"},
}


@dataclass
class Row:
    """One kind of fault as measured; a row of the table."""

    fault: str
    tried: int = 0
    survived: int = 0
    compared: int = 0  # how often all outs were compared with the undisturbed run's; any difference ends the case
    repaired: int = 0  # how often a kill cut DVC's own writing short and the documented remedy was taken
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
        self.longest_without_save: float | None = None  # seconds; a kill costs at most this
        self.tree = finished or self.undisturbed()
        self.outs = outs_of(self.tree)

    def undisturbed(self) -> Path:
        tree, self.longest_without_save = self.fresh("undisturbed"), 0.0
        process = start(tree, *REPRO)
        while process.poll() is None:
            self.longest_without_save = max(self.longest_without_save, time.time() - last_saved(tree))
            time.sleep(0.25)
        assert process.returncode == 0, output_of(tree)
        wait_until_idle(tree, MIRROR_SECONDS)
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
        """`dvc repro` to the end, then the comparison; returns the output."""
        text = succeeds(tree, *REPRO)
        self.compare(tree, row)
        return text


def remove_results(tree: Path, *stages: str) -> None:
    """These stages, or all, must run again: DVC can restore none of their results."""
    lock = yaml.safe_load((tree / "dvc.lock").read_text())
    for stage in stages or list(lock["stages"]):
        for out in lock["stages"].pop(stage)["outs"]:
            path = tree / out["path"]
            shutil.rmtree(path) if path.is_dir() else path.unlink()
    (tree / "dvc.lock").write_text(yaml.safe_dump(lock, sort_keys=False))
    shutil.rmtree(tree / ".dvc/cache/runs", ignore_errors=True)


@contextlib.contextmanager
def in_sheet(tree: Path, line: str) -> Iterator[None]:
    """With this line more in params.yaml."""
    sheet = tree / "params.yaml"
    before = sheet.read_text()
    sheet.write_text(f"{before}\n{line}\n")
    yield
    sheet.write_text(before)


def training(tree: Path) -> subprocess.Popen:
    """pretrain under DVC, from nothing to its first checkpoint."""
    remove_results(tree, "pretrain")
    process = start(tree, *REPRO, "pretrain")
    wait_for(lambda: checkpoint_of(tree), process, tree)
    return process


def run(bench: Bench, case: Callable, **how) -> Row:
    """One case; its row says why it failed or was skipped. Its processes and files are removed."""
    row = Row(case.__doc__ or case.__name__)
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
