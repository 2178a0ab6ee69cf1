"""Files that are truncated, altered or removed."""

import random
import re
import shutil
from functools import partial
from glob import glob
from pathlib import Path

from chaos.bench import Bench, Row, in_sheet, remove_results, training
from chaos.commands import (
    HANG_SECONDS,
    NO_SERVER,
    REPRO,
    checkpoint_of,
    is_in_parts,
    kill_everything,
    line_with,
    output_of,
    refuses,
    stage_command,
    start,
    succeeds,
    wait_for,
)
from stages.files.artifacts import read_json, sha256_of


def truncate(path: Path, rng: random.Random) -> None:
    path.write_bytes(path.read_bytes()[: rng.randrange(path.stat().st_size)])


def flip_a_bit(path: Path, rng: random.Random) -> None:
    content = bytearray(path.read_bytes())
    content[rng.randrange(len(content))] ^= 1 << rng.randrange(8)
    path.write_bytes(content)


def remove(path: Path, _: random.Random) -> None:
    path.unlink()


def damaged(bench: Bench, row: Row, path: str, reader: str | None) -> None:
    """A stage by hand refuses the file by name; `dvc repro` brings it back."""
    name = f"damaged-{path.replace('/', '-')}"
    tree, rng = bench.copy(name), bench.random(name)
    for change in (truncate, flip_a_bit):
        row.tried += 1
        change(tree / path, rng)
        if reader:
            row.message = refuses(tree, re.escape(path), *stage_command(reader), MLFLOW_TRACKING_URI=NO_SERVER)
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
        for change in (truncate, flip_a_bit):
            name = f"damaged-checkpoint-{row.tried}"
            tree = bench.copy(name)
            training(tree)
            kill_everything(tree)
            row.tried += 1
            change(next(tree.glob(f".runs/resume/*/{part}")), bench.random(name))
            row.message = line_with("is damaged .* its work is done again", bench.finish(tree, row))
            row.survived += 1


def half_uploaded(bench: Bench, row: Row) -> None:
    """a checkpoint in parts (fsdp2) comes back with one part by half, or without it; then dvc repro"""
    tree = bench.copy("half-uploaded")
    with in_sheet(tree, "trainer: {strategy: fsdp2}"):
        remove_results(tree, "pretrain")
        succeeds(tree, *REPRO, "pretrain")
        undisturbed = sha256_of(tree / "artifacts/teacher")
        for change in (truncate, remove):
            shutil.rmtree(tree / ".runs/resume")
            remove_results(tree, "pretrain")
            process = start(tree, *REPRO, "pretrain")
            wait_for(lambda: is_in_parts(tree), process, tree)
            kill_everything(tree)
            row.tried += 1
            index = checkpoint_of(tree)
            assert index
            change(index.with_name(read_json(index)["parts"][1]["file"]), bench.random("half-uploaded"))
            row.message = line_with("is damaged .* its work is done again", succeeds(tree, *REPRO, "pretrain"))
            assert sha256_of(tree / "artifacts/teacher") == undisturbed
            row.compared += 1
            row.survived += 1
    bench.finish(tree, row)


def damaged_progress(bench: Bench, row: Row) -> None:
    """what evaluate and prepare saved of unfinished work, the same; then dvc repro"""
    for stage, part in (("evaluate", "sums"), ("prepare", "tokenizer.json")):
        for change in (truncate, flip_a_bit):
            name = f"damaged-{part}-{change.__name__}"
            tree = bench.copy(name)
            remove_results(tree, stage)
            process = start(tree, *REPRO, stage)
            saved = partial(glob, str(tree / f".runs/resume/{stage}-*/{part}"))
            wait_for(saved, process, tree)
            kill_everything(tree)
            row.tried += 1
            change(Path(saved()[0]), bench.random(name))
            row.message = line_with("is damaged: its work is done again", bench.finish(tree, row))
            row.survived += 1


def damaged_lock(bench: Bench, row: Row) -> None:
    """dvc.lock, truncated; where DVC cannot read it or go on from it, the user gets it back from git"""
    tree, rng = bench.copy("damaged-lock"), bench.random("damaged-lock")
    committed = (tree / "dvc.lock").read_bytes()
    for _ in range(3):
        row.tried += 1
        truncate(tree / "dvc.lock", rng)
        if start(tree, *REPRO).wait(HANG_SECONDS):
            row.message = line_with("dvc.lock|failed to reproduce", output_of(tree))
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


CASES = (
    damaged_shard, damaged_test_shard, damaged_tokenizer, damaged_card, damaged_weights, damaged_config,
    damaged_metrics, damaged_curve, damaged_scores, damaged_checkpoint, half_uploaded, damaged_progress,
    damaged_lock, damaged_settings, out_removed,
)  # fmt: skip
