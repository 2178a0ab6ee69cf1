"""Full and read-only disks."""

import contextlib
import subprocess
from collections.abc import Iterator
from pathlib import Path

from benchmarks.checkout import DVC
from chaos.bench import Bench, Row, Skipped, remove_results, training
from chaos.commands import (
    HANG_SECONDS,
    MIRROR_SECONDS,
    NO_SERVER,
    REPRO,
    checkpoint_of,
    line_with,
    output_of,
    refuses,
    stage_command,
    succeeds,
    wait_until_idle,
)
from stages.files.artifacts import sha256_of


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
        code = process.wait(HANG_SECONDS)
        assert "Traceback" not in output_of(tree), output_of(tree)[-3000:]
        row.message = line_with("could not be written", output_of(tree))
        if code != 0:
            assert checkpoint_of(tree), "the checkpoint before is gone"
            ballast.unlink()
            line_with("continues after step", bench.finish(tree, row))
        else:
            bench.finish(tree, row)
        wait_until_idle(tree, MIRROR_SECONDS)
    row.survived += 1


def disk_full_out(bench: Bench, row: Row) -> None:
    """the disk fills up while shards are written (a tmpfs of 512 KB)"""
    tree = bench.copy("disk-full-out")
    place = tree / "outputs/small"
    place.mkdir(parents=True)
    with mounted(place, "-t", "tmpfs", "-o", "size=512k", "tmpfs"):
        row.tried += 1
        words = stage_command("prepare", f"hydra.run.dir={place}")
        row.message = refuses(tree, "No space left", *words, MLFLOW_TRACKING_URI=NO_SERVER)
        assert not (place / "artifacts/data/card.json").exists(), "a folder that is not whole has a card"
    succeeds(tree, *stage_command("prepare", f"hydra.run.dir={place}"), MLFLOW_TRACKING_URI=NO_SERVER)
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
            line = refuses(tree, "Read-only", *stage_command(stage), DVC_STAGE=stage, MLFLOW_TRACKING_URI=NO_SERVER)
            refuses(tree, "Read-only", *REPRO, "-f", "-s", stage)
        row.message = row.message or line
        bench.finish(tree, row)
        row.survived += 1


def cache_full(bench: Bench, row: Row) -> None:
    """DVC's cache is full when it saves a trained model (a tmpfs of 256 KB)"""
    tree = bench.copy("cache-full")
    remove_results(tree, "pretrain")
    cache = tree / "small-cache"
    cache.mkdir()
    with mounted(cache, "-t", "tmpfs", "-o", "size=256k", "tmpfs"):
        succeeds(tree, *DVC, "config", "--local", "cache.dir", str(cache))
        row.tried += 1
        row.message = refuses(tree, "No space left", *REPRO, "-s", "pretrain")
        subprocess.run(["mount", "-o", "remount,size=100m", str(cache)], check=True)
        line_with(r"teacher: continues after step (\d+) of \1", succeeds(tree, *REPRO, "-s", "pretrain"))
    (tree / ".dvc/config.local").unlink()
    bench.finish(tree, row)
    row.survived += 1
