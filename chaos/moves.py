"""A run that moves between strategies while it is killed again and again."""

import csv
import time
from pathlib import Path

from chaos.bench import Bench, Row, in_sheet, remove_results, training
from chaos.commands import REPRO, is_in_parts, last_saved, line_with, start, succeeds, wait_for, wait_until_idle
from chaos.kills import kill_group
from stages.files.artifacts import read_json

END_SECONDS = 60  # what a kill leaves must have ended by then, on a busy machine too
LOSS = 0.01  # nats by which a moved run may differ: clipping and bfloat16 round other sums, and routers choose by them


def moved(bench: Bench, row: Row) -> None:
    """kill -9 in mid-training under ddp, then under fsdp2, to which the run has moved; it ends there"""
    tree = bench.copy("moved")
    process = training(tree)
    _kill(tree, process, row)
    with in_sheet(tree, "trainer: {strategy: fsdp2, move: true}"):
        process = start(tree, *REPRO, "pretrain")
        wait_for(lambda: is_in_parts(tree), process, tree)
        _kill(tree, process, row)
        told = succeeds(tree, *REPRO, "pretrain")
    row.message = line_with("continues after step", told)
    found = read_json(tree / "measurements/pretrain.json")["moved"]["teacher"]
    assert [place["strategy"] for place in found["places"].values()] == ["ddp", "fsdp2"], found
    assert found["data_order_equal"], found
    curves = [_losses(root) for root in (bench.tree, tree)]
    farthest = max(abs(one - other) for one, other in zip(*curves, strict=True))
    assert farthest < LOSS, f"the loss of the moved run is {farthest:.4f} nats off"
    row.message += f"; largest difference of loss to a run that stayed: {farthest:.5f}"
    remove_results(tree, "pretrain")
    bench.finish(tree, row)  # what has moved leaves nothing behind in the old place
    row.survived = row.tried


def _kill(tree: Path, process, row: Row) -> None:
    row.tried += 1
    row.lost.append(time.time() - last_saved(tree))
    kill_group(tree, process)
    process.wait()
    wait_until_idle(tree, END_SECONDS, mirrors=False)


def _losses(root: Path) -> list[float]:
    with (root / "plots/pretrain/teacher.csv").open(newline="") as file:
        return [float(line["loss"]) for line in csv.DictReader(file)]
