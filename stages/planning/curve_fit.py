"""Which network would give a curve of throughput against nodes: for each algorithm, the link speed or latency needed.

The step of a fully sharded model takes c + sum of its collectives; nothing overlaps. The collectives are linear in the
latency and in one over the bandwidth, so each is fitted with c by least squares, the other being the chip's own.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from stages.planning.chips import Chip
from stages.planning.collectives import (
    hierarchical_all_reduce_seconds,
    ring_all_reduce_seconds,
    tree_all_reduce_seconds,
)

REDUCES_PER_LAYER = 1.5  # fully sharded: two all-gathers and one reduce-scatter, each half an all-reduce
BYTES_PER_PARAMETER = 2  # bfloat16
LIKE_THE_CHIP, CLOSE = 3.0, 0.03  # a needed value within this factor of the chip's own, a relative rms error up to this

Seconds = Callable[[int, float, float], float]  # of nodes, bytes per second between nodes, latency between nodes


@dataclass(frozen=True)
class Fit:
    algorithm: str
    fitted: str  # latency_seconds or bytes_per_second, between nodes
    needed: float | None  # None: no value gives the curve
    of_chip: float
    compute_seconds: float  # c
    error: float  # relative rms of the step times
    plausible: bool


def step_seconds(tokens_per_chip_step: int, chips: int, tokens_per_second: float) -> float:
    return tokens_per_chip_step * chips / tokens_per_second


def explain(
    nodes: Sequence[int],
    tokens_per_second: Sequence[float],
    chips_per_node: int,
    tokens_per_chip_step: int,
    parameters: float,
    layers: int,
    chip: Chip,
) -> list[Fit]:
    """A fit for each algorithm and each of latency and bandwidth."""
    assert chip.inter_bytes_per_second is not None, chip.name
    seconds = np.array(
        [
            step_seconds(tokens_per_chip_step, n * chips_per_node, speed)
            for n, speed in zip(nodes, tokens_per_second, strict=True)
        ]
    )
    fits = []
    for name, collective in algorithms(chip, chips_per_node, parameters * BYTES_PER_PARAMETER / layers).items():
        reduces = REDUCES_PER_LAYER * layers
        fixed = np.array([collective(n, chip.inter_bytes_per_second, 0.0) for n in nodes]) * reduces
        slope = np.array([collective(n, chip.inter_bytes_per_second, 1.0) for n in nodes]) * reduces - fixed
        fits.append(_fit(name, "latency_seconds", seconds - fixed, slope, seconds, chip.inter_latency_seconds))
        fixed = np.array([collective(n, float("inf"), chip.inter_latency_seconds) for n in nodes]) * reduces
        slope = np.array([collective(n, 1.0, chip.inter_latency_seconds) for n in nodes]) * reduces - fixed
        fits.append(_fit(name, "bytes_per_second", seconds - fixed, slope, seconds, chip.inter_bytes_per_second))
    return fits


def algorithms(chip: Chip, g: int, layer_bytes: float) -> dict[str, Seconds]:
    """Seconds of an all-reduce of a layer on nodes of `g` chips."""
    intra, latency = chip.intra_bytes_per_second, chip.intra_latency_seconds
    return {
        "flat ring": lambda n, speed, alpha: ring_all_reduce_seconds(layer_bytes, n * g, speed, alpha),
        "tree": lambda n, speed, alpha: tree_all_reduce_seconds(layer_bytes, n, g, speed, latency, alpha),
        "hierarchical": lambda n, speed, alpha: hierarchical_all_reduce_seconds(
            layer_bytes, n, g, intra, speed, latency, alpha
        ),
    }


def _fit(algorithm, fitted, rest, slope, seconds, of_chip):
    """c and x of rest = c + x slope, errors weighed relative to the whole step."""
    columns = np.stack([np.ones_like(slope), slope], axis=1) / seconds[:, None]
    (c, x), _, rank, _ = np.linalg.lstsq(columns, rest / seconds, rcond=1e-9)
    error = float(np.sqrt(np.mean((columns @ np.array([c, x]) - rest / seconds) ** 2)))
    if rank < 2 or c <= 0 or x <= 0:  # the same time on any number of nodes; less than none for computing or the link
        return Fit(algorithm, fitted, None, of_chip, float(c), error, False)
    needed = float(x) if fitted == "latency_seconds" else float(1 / x)
    like = max(needed / of_chip, of_chip / needed) <= LIKE_THE_CHIP
    return Fit(algorithm, fitted, needed, of_chip, float(c), error, bool(like and error <= CLOSE))
