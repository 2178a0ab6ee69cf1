"""How much of the time a large run works: failures, checkpoints, restarts.

Sources: Young 1974 (CACM 17(9), first-order optimum checkpoint interval); Kokolis et al. 2024, "Revisiting Reliability
in Large-Scale Machine Learning Research Clusters" (arXiv 2410.21680), effective training time ratio.
"""

from typing import Any

Number = Any  # a float, or a quantity with a unit

SECONDS_PER_DAY = 86_400


def mtbf_seconds(nodes: int, failures_per_node_day: Number) -> Number:
    """Mean time between failures of a job: 1 / (N r), failures of nodes being independent (arXiv 2410.21680)."""
    return SECONDS_PER_DAY / (nodes * failures_per_node_day)


def checkpoint_state_bytes(parameters: float, bytes_per_parameter: float) -> float:
    """Size of a checkpoint. 14 bytes per parameter: bfloat16 weights, float32 copy and two Adam moments in float32."""
    return parameters * bytes_per_parameter


def checkpoint_seconds(state_bytes: Number, nodes: int, write_bytes_per_second_per_node: Number) -> Number:
    """Time in which all nodes together write one checkpoint, each its equal part."""
    return state_bytes / (nodes * write_bytes_per_second_per_node)


def young_interval_seconds(checkpoint_seconds: Number, mtbf_seconds: Number) -> Number:
    """Time between checkpoints that loses least: sqrt(2 w MTBF) (Young 1974). Valid where w is far below the MTBF."""
    return (2 * checkpoint_seconds * mtbf_seconds) ** 0.5


def goodput(
    checkpoint_seconds: Number, interval_seconds: Number, mtbf_seconds: Number, restart_seconds: Number
) -> Number:
    """Share of the time that moves training forward: (1 - (u + tau / 2) / MTBF) / (1 + w / tau), never below 0.

    arXiv 2410.21680, equation of the expected effective training time ratio. A failure costs a restart u and on
    average half an interval tau of work; each interval costs one checkpoint w.
    """
    lost = (restart_seconds + interval_seconds / 2) / mtbf_seconds
    return max(0 * lost, 1 - lost) / (1 + checkpoint_seconds / interval_seconds)
