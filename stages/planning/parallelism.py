"""What each kind of parallelism adds to a step: idle pipeline stages, and bytes that a chip sends.

b is bytes per element. Bytes are those that one chip sends; divide by its bandwidth for seconds.
"""

from typing import Any

Number = Any  # a float, or a quantity with a unit


def pipeline_bubble_micro_batches(pipeline_ranks: int, virtual_stages: int = 1) -> float:
    """Time that a chip idles in a step, in units of its own time for one micro-batch: (p - 1) / v.

    1F1B with v interleaved stages a chip: Narayanan et al. 2021 (arXiv 2104.04473), section 2.2.2.
    """
    return (pipeline_ranks - 1) / virtual_stages


def dual_pipe_bubble_seconds(
    pipeline_ranks: int, overlapped_seconds: Number, backward_seconds: Number, weight_gradient_seconds: Number
) -> Number:
    """(p / 2 - 1) (F&B + B - 3 W): DeepSeek-V3 report (arXiv 2412.19437), table 2.

    F&B is a forward and a backward chunk that overlap, B a whole backward chunk, W the part of it that only makes
    gradients of weights.
    """
    return (pipeline_ranks / 2 - 1) * (overlapped_seconds + backward_seconds - 3 * weight_gradient_seconds)


def data_parallel_bytes_per_parameter(
    zero_stage: int, micro_batches: int, parameter_bytes: Number, gradient_bytes: Number
) -> Number:
    """What is gathered or reduced for one parameter in a step; an all-reduce counts twice.

    Stage 0: an all-reduce of gradients. Stages 1 and 2: a reduce-scatter of gradients, an all-gather of parameters.
    Stage 3 and FSDP: two all-gathers of parameters for each micro-batch and one reduce-scatter of gradients. Source:
    Rajbhandari et al. 2020 (ZeRO, arXiv 1910.02054), section 7.
    """
    if zero_stage == 0:
        return 2 * gradient_bytes
    gathers = 2 * micro_batches if zero_stage == 3 else 1
    return gathers * parameter_bytes + gradient_bytes


def data_parallel_wire_bytes(parameters: float, ranks: int, bytes_per_parameter: Number) -> Number:
    """Bytes that a chip sends in a step so that `ranks` replicas of these parameters agree: (n - 1) / n of each."""
    return (ranks - 1) / ranks * parameters * bytes_per_parameter


def tensor_parallel_wire_bytes(
    tokens: float, width: int, layers: float, ranks: int, activation_bytes: Number
) -> Number:
    """Two all-reduces forward and two backward in each layer (Shoeybi et al. 2019, arXiv 1909.08053, section 3).

    With sequence parallelism they become reduce-scatters and all-gathers of the same bytes (arXiv 2205.05198).
    """
    return 4 * layers * 2 * (ranks - 1) / ranks * tokens * width * activation_bytes


def pipeline_wire_bytes(tokens: float, width: int, virtual_stages: int, activation_bytes: Number) -> Number:
    """Activations forward and their gradients backward over each boundary that a chip feeds: v of each.

    arXiv 2104.04473, section 2.2.2: interleaving multiplies the traffic by v.
    """
    return 2 * virtual_stages * tokens * width * activation_bytes


def moe_wire_bytes_per_token(
    width: int,
    layers: float,
    destinations_per_token: float,
    expert_ranks: int,
    dispatch_bytes: Number,
    combine_bytes: Number,
) -> Number:
    """Bytes that one token adds to the network in all mixture layers, forward and backward.

    2 L M (1 - 1 / n) d (b_dispatch + b_combine). M is how many copies of a token travel: the experts per token, or the
    node limit of DeepSeek-V3's routing, which sends one copy to each of at most 4 nodes and forwards it there (arXiv
    2412.19437, section 3.2.2). The backward pass sends the same bytes the other way.
    """
    away = destinations_per_token * (1 - 1 / expert_ranks)
    return 2 * layers * away * width * (dispatch_bytes + combine_bytes)
