"""How the teacher's training step grows along one axis at a time, beside what its operations ask.

The exponents of time and memory (slopes of log-log least squares) stand beside the operations' own: a term that
grows worse than it must shows as a larger one. Writes growth.md and growth.svg, in a file of its own for each kind of
machine, as results.md has it.
"""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import repeat
from pathlib import Path
from statistics import linear_regression, mean
from typing import Any

import torch
from torch import Tensor

from benchmarks.ceiling import DTYPES
from benchmarks.table import ROOT, Row, conditions, listed, of_this_machine
from benchmarks.timing import DEVICE, Ratio, Timings, interleaved
from benchmarks.training_step import BALANCE_LOSS_WEIGHT, REFERENCE, new_teacher, teacher_step
from stages.files.artifacts import write_atomically
from stages.measure.flops import flops_per_token, total_parameters
from stages.model.checkpointing import LiveBytes
from stages.model.families.deepseek_v3.model import DeepseekV3 as Teacher
from stages.model.families.deepseek_v3.model import DeepseekV3Shape as TeacherShape
from stages.reporting.charts import curves, sheet
from stages.reporting.drawing import Line
from stages.reporting.wording import number
from stages.training.fit import NextToken, max_violation

BATCH_TOKENS = 4096
BALANCE_TOKENS, BALANCE_STEPS, WINDOW = 1024, 30, 10
DTYPE = DTYPES.get("bf16", torch.float32)


@dataclass(frozen=True)
class Axis:
    name: str
    fields: tuple[str, ...]  # of the teacher's shape; the first gives the axis its numbers
    factors: tuple[float, ...]  # ascending, times the reference

    def shapes(self, reference: TeacherShape) -> dict[int, TeacherShape]:
        """The axis's points by size."""
        shapes = {}
        for factor in self.factors:
            grown: dict[str, Any] = {field: int(getattr(reference, field) * factor) for field in self.fields}
            shapes[grown[self.fields[0]]] = replace(reference, **grown)
        return shapes


EXPERTS = Axis("experts", ("experts",), (1, 2, 4, 8))
AXES = (
    EXPERTS,
    Axis("layers", ("layers",), (0.5, 1, 2, 4)),
    Axis("width", ("width", "heads"), (0.5, 1, 2, 4)),
    Axis("tokens of a sequence", ("sequence_tokens",), (1, 2, 4, 8, 16)),  # the batch's tokens stay
    Axis("vocabulary", ("vocab_size",), (1, 4, 8, 16)),
)


@dataclass(frozen=True)
class Point:
    size: int
    parameters: int
    flops: float  # of a step
    activation_bytes: int
    peak_bytes: int
    seconds: float
    times_reference: float


def text(vocab: int, sequences: int, tokens: int) -> Tensor:
    """Token ids [B, T+1] of a Markov chain: a token follows from the one before, or every other time on average
    is drawn anew by the Zipf-Mandelbrot law of words, 1 / (rank + 2.7)."""
    generator = torch.Generator().manual_seed(0)
    word_V = 1 / (torch.arange(1, vocab + 1) + 2.7)
    follower_V = word_V.multinomial(vocab, True, generator=generator)
    ids_BT1 = word_V.multinomial(sequences * (tokens + 1), True, generator=generator).view(sequences, -1)
    follows_BT1 = torch.rand(ids_BT1.shape, generator=generator) < 0.5
    for t in range(1, tokens + 1):
        ids_BT1[:, t] = torch.where(follows_BT1[:, t], follower_V[ids_BT1[:, t - 1]], ids_BT1[:, t])
    return ids_BT1.to(DEVICE)


def batch_of(shape: TeacherShape, tokens: int) -> Tensor:
    return text(shape.vocab_size, max(1, tokens // shape.sequence_tokens), shape.sequence_tokens)


def live_bytes(model: Teacher, tokens_BT1: Tensor) -> tuple[int, int]:
    """Kept for the backward pass, and alive at most in both passes, temporaries and gradients included."""
    live = LiveBytes(model)
    with live:
        with live.record(), torch.autocast(DEVICE.type, torch.bfloat16, enabled=DTYPE == torch.bfloat16):
            loss = NextToken(BALANCE_LOSS_WEIGHT)(model, tokens_BT1).loss
        kept = live.now  # before the gradients, which stay as well
        with live.record():
            loss.backward()
    model.zero_grad(set_to_none=True)
    return kept, live.peak


def measured(
    shapes: dict[int, TeacherShape], reference: TeacherShape, tokens: int, seconds: float, least_rounds: int
) -> tuple[list[Point], Timings]:
    """The points of an axis, timed in the same rounds: what disturbs one disturbs its neighbours."""
    steps, counted = {}, {}
    for size, shape in shapes.items():
        model, tokens_BT1 = new_teacher(shape), batch_of(shape, tokens)
        flops = 3 * tokens * flops_per_token(shape, shape.sequence_tokens)["total"]  # backward is twice forward
        counted[size] = total_parameters(model), flops, *live_bytes(model, tokens_BT1)
        steps[str(size)] = teacher_step(model, repeat(tokens_BT1), DTYPE)
    times = interleaved(steps, seconds, least_rounds)
    at_reference = next(str(size) for size, shape in shapes.items() if shape == reference)
    points = [
        Point(size, *counted[size], times.median(str(size)), times.ratio(str(size), at_reference).ratio)
        for size in shapes
    ]
    return points, times


def exponent(sizes: Sequence[float], values: Sequence[float]) -> float:
    """b of the power law a * size^b nearest to the values: the least-squares slope of their logarithms."""
    return linear_regression([math.log(size) for size in sizes], [math.log(value) for value in values]).slope


def violations(shape: TeacherShape, tokens: int, steps: int) -> tuple[float, float]:
    """The load's largest excess over its mean in the first and in the last steps, averaged over the layers.

    Loads are summed over a window of steps: at 32 tokens per expert a single one shows little but chance.
    """
    model = new_teacher(shape)
    loads: list[list[Tensor]] = [[] for _ in model.blocks]
    for block, seen in zip(model.blocks, loads, strict=True):
        block.mlp.register_forward_hook(lambda _, __, out, seen=seen: seen.append(out[1].load_E))
    batches = batch_of(shape, tokens * steps).split(max(1, tokens // shape.sequence_tokens))
    step = teacher_step(model, iter(batches), DTYPE)
    for _ in batches:
        step()
    first, last = (
        mean(max_violation(torch.stack(seen[window]).sum(0)) for seen in loads)
        for window in (slice(WINDOW), slice(-WINDOW, None))
    )
    return first, last


# ---- what is told


def doubling(axis: Axis, points: list[Point], times: Timings) -> Row:
    """The last two points: above 1, time grew less than the operations."""
    before, after = points[-2:]
    time, operations = times.ratio(str(after.size), str(before.size)), after.flops / before.flops
    better = Ratio(operations / time.ratio, operations / time.high, operations / time.low)
    what = f"{axis.name} {before.size} to {after.size}: time"
    return Row.of("growth", what, time.ratio, "operations", operations, "times", better, times.rounds)


def exponents(points: list[Point]) -> dict[str, float]:
    """Of each quantity along an axis."""
    kinds = ("flops", "seconds", "parameters", "activation_bytes", "peak_bytes")
    sizes = [point.size for point in points]
    return {kind: exponent(sizes, [getattr(point, kind) for point in points]) for kind in kinds}


def as_markdown(found: dict[str, list[Point]], balance: dict[int, tuple[float, float]], tokens: int) -> str:
    fits = "\n".join(
        f"| {name} | {points[0].size} to {points[-1].size} | "
        + " | ".join(f"{value:.2f}" for value in exponents(points).values())
        + " |"
        for name, points in found.items()
    )
    rows = "\n".join(
        f"| {name} | {p.size} | {number(p.parameters)} | {p.flops / 1e9:,.0f} | {p.seconds:.2f} | "
        f"{p.times_reference:.2f} | {p.flops / p.seconds / 1e9:.0f} | {p.activation_bytes / 1e6:,.0f} | "
        f"{p.peak_bytes / 1e6:,.0f} |"
        for name, points in found.items()
        for p in points
    )
    even = "\n".join(f"| {size} | {first:.2f} | {last:.2f} |" for size, (first, last) in balance.items())
    return f"""# Growth

Written by `make bench` and `python -m benchmarks growth`: the teacher's training step (forward, backward, AdamW;
{str(DTYPE).removeprefix("torch.")}, {tokens} tokens in a batch) along one axis at a time around the reference shape.

![growth]({of_this_machine('growth')}.svg)

{listed(conditions())}

## Exponents

Slopes of log-log least squares. An axis that only a part of the step follows has one below 1; time's should be no
larger than the operations', unless parameters grow: the optimizer reads and writes them all, whoever uses them.

| axis | from, to | operations | time | parameters | activations | peak |
| --- | --- | --: | --: | --: | --: | --: |
{fits}

## Points

Operations by formula (stages/cost.py), three times the forward pass. Activations are kept for the backward pass; the
peak has temporaries and gradients too, parameters and optimizer apart.

| axis | size | parameters | GFLOP | s per step | times the reference | GFLOP/s | activations, MB | peak, MB |
| --- | --: | --: | --: | --: | --: | --: | --: | --: |
{rows}

## Balance

The largest load over the mean load, minus one, averaged over the layers, with the bias balancing on: of the first and
the last {WINDOW} of {BALANCE_STEPS} steps of {BALANCE_TOKENS} tokens of a Markov chain over a Zipf-Mandelbrot
vocabulary.

| experts | first steps | last steps |
| --: | --: | --: |
{even}
"""


def as_picture(found: dict[str, list[Point]], balance: dict[int, tuple[float, float]]) -> str:
    kinds = {"time": "seconds", "operations": "flops", "activations": "activation_bytes", "peak": "peak_bytes"}
    size = {"width": 440, "height": 300}
    panels = []
    for name, points in found.items():
        lines = []
        for series, (label, kind) in enumerate(kinds.items()):
            first = getattr(points[0], kind)
            grown = [(float(point.size), getattr(point, kind) / first) for point in points]
            lines.append(Line(label, grown, series, dashed=label == "operations"))
        panels.append(curves(f"growth with {name}", lines, name, "times the first point", log=True, **size))
    windows = {"first steps": 0, "last steps": 1}
    lines = [
        Line(label, [(float(size), found[at]) for size, found in balance.items()], at) for label, at in windows.items()
    ]
    panels.append(curves("balance", lines, "experts", "largest load over the mean, minus one", log=True, **size))
    return sheet("How a training step grows", panels, 2, **size)


def rows(
    reference: TeacherShape = REFERENCE,
    axes: Sequence[Axis] = AXES,
    tokens: int = BATCH_TOKENS,
    balance_tokens: int = BALANCE_TOKENS,
    seconds: float = 10.0,
    least_rounds: int = 3,
    folder: Path = ROOT / "benchmarks",
) -> Iterator[Row]:
    found = {}
    for axis in axes:
        found[axis.name], times = measured(axis.shapes(reference), reference, tokens, seconds, least_rounds)
        yield doubling(axis, found[axis.name], times)
    balance = {
        size: violations(shape, balance_tokens, BALANCE_STEPS) for size, shape in EXPERTS.shapes(reference).items()
    }
    written = of_this_machine("growth")
    write_atomically(folder / f"{written}.md", as_markdown(found, balance, tokens))
    write_atomically(folder / f"{written}.svg", as_picture(found, balance))
