"""Seconds and bytes of collective operations between chips, by the alpha-beta model.

Each function takes bytes, bytes per second and seconds, and gives seconds (or bytes, where its name says so). Any
consistent unit works: the tests run them with quantities of `pint`.

Sources: Thakur, Rabenseifner and Gropp, "Optimization of Collective Communication Operations in MPICH" (2005); NVIDIA
nccl-tests, doc/PERFORMANCE.md (bus bandwidth); NVIDIA NCCL, src/graph/tuning.cc (latency of trees).
"""

import math
from typing import Any

Number = Any  # a float, or a quantity with a unit


def ring_wire_bytes(tensor_bytes: Number, ranks: int) -> Number:
    """Bytes that each rank sends in a ring all-reduce: 2 (n - 1) / n of the tensor (Thakur et al. 2005, 4.4)."""
    return 2 * (ranks - 1) / ranks * tensor_bytes


def ring_all_reduce_seconds(
    tensor_bytes: Number, ranks: int, bandwidth_bytes_per_second: Number, latency_seconds: Number
) -> Number:
    """2 (n - 1) / n * S / B + 2 (n - 1) alpha: reduce-scatter, then all-gather, around a ring (Thakur et al. 2005)."""
    steps = 2 * (ranks - 1)
    return ring_wire_bytes(tensor_bytes, ranks) / bandwidth_bytes_per_second + steps * latency_seconds


def ring_all_gather_seconds(
    tensor_bytes: Number, ranks: int, bandwidth_bytes_per_second: Number, latency_seconds: Number
) -> Number:
    """Half an all-reduce; also the time of a reduce-scatter. `tensor_bytes` is the whole tensor, of all ranks."""
    return ring_all_reduce_seconds(tensor_bytes, ranks, bandwidth_bytes_per_second, latency_seconds) / 2


def tree_all_reduce_seconds(
    tensor_bytes: Number,
    nodes: int,
    chips_per_node: int,
    bandwidth_bytes_per_second: Number,
    intra_latency_seconds: Number,
    inter_latency_seconds: Number,
) -> Number:
    """2 S / B + 2 ((g - 1) alpha_intra + log2(N) alpha_inter): up and down a double binary tree over N nodes.

    Source: NCCL src/graph/tuning.cc. Inside a node of g chips the tree is a chain. Every chip sends and receives the
    whole tensor, so one chip alone pays nothing and two pay what a ring of infinitely many pays.
    """
    if nodes * chips_per_node == 1:
        return 0 * inter_latency_seconds
    hops = (chips_per_node - 1) * intra_latency_seconds + math.log2(nodes) * inter_latency_seconds
    return 2 * tensor_bytes / bandwidth_bytes_per_second + 2 * hops


def hierarchical_all_reduce_parts(
    tensor_bytes: Number,
    nodes: int,
    chips_per_node: int,
    intra_bandwidth_bytes_per_second: Number,
    inter_bandwidth_bytes_per_second: Number,
    intra_latency_seconds: Number,
    inter_latency_seconds: Number,
) -> tuple[Number, Number]:
    """Seconds inside nodes and seconds between them, of an all-reduce in three steps.

    Reduce-scatter inside the node, ring all-reduce of each chip's part across nodes, all-gather inside the node:
    2 (g - 1) / g * S / B_intra, and 2 (N - 1) / N * (S / g) / B_inter, each with the latency of its ring. Both
    bandwidths are those of one chip; one that no ring uses may be null. Source: Mikami et al. 2018 (2D-torus
    all-reduce, arXiv 1811.05233); Fire-Flyer's HFReduce has the same traffic (arXiv 2408.14158).
    """

    def ring(size, ranks, bandwidth, latency):
        return ring_all_reduce_seconds(size, ranks, bandwidth, latency) if ranks > 1 else 0 * latency

    inside = ring(tensor_bytes, chips_per_node, intra_bandwidth_bytes_per_second, intra_latency_seconds)
    part = tensor_bytes / chips_per_node
    return inside, ring(part, nodes, inter_bandwidth_bytes_per_second, inter_latency_seconds)


def hierarchical_all_reduce_seconds(
    tensor_bytes: Number,
    nodes: int,
    chips_per_node: int,
    intra_bandwidth_bytes_per_second: Number,
    inter_bandwidth_bytes_per_second: Number,
    intra_latency_seconds: Number,
    inter_latency_seconds: Number,
) -> Number:
    """The sum of `hierarchical_all_reduce_parts`: its steps follow one another."""
    inside, across = hierarchical_all_reduce_parts(
        tensor_bytes,
        nodes,
        chips_per_node,
        intra_bandwidth_bytes_per_second,
        inter_bandwidth_bytes_per_second,
        intra_latency_seconds,
        inter_latency_seconds,
    )
    return inside + across


def flat_ring_bandwidth(node_bandwidth_bytes_per_second: Number, crossings_per_node: int) -> Number:
    """Bandwidth of a ring that leaves each node `crossings_per_node` times: its links share the node's network.

    A ring that visits the chips of a node one after the other crosses once. Bad placement crosses up to g times.
    """
    return node_bandwidth_bytes_per_second / crossings_per_node


def all_to_all_seconds(
    bytes_per_rank: Number, ranks: int, bandwidth_bytes_per_second: Number, latency_seconds: Number
) -> Number:
    """(n - 1) / n of what a rank holds leaves it, in n - 1 messages (Thakur et al. 2005, pairwise exchange)."""
    return (ranks - 1) / ranks * bytes_per_rank / bandwidth_bytes_per_second + (ranks - 1) * latency_seconds
