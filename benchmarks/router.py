"""The router alone, from hidden states to rows in the order of their experts.

Scores, top-k, weights, permutation and rows per expert: all that the layer does before its first product. In training
a balance loss comes to it, for the peer the one that goes with it. On a GPU ours is compiled, as in training, and
replayed as a CUDA graph, for alone its launches would take longer than its work; the peer's shapes depend on the data,
which neither permits.
"""

from collections.abc import Iterator
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.moe_layer import new_layer
from benchmarks.table import Row
from benchmarks.timing import DEVICE, Action, interleaved
from stages.model.experts import Gates, MoE, balance_loss
from stages.model.kernels.routing import loads, permutation


def sorted_routing(layer: MoE, x_ND: Tensor) -> tuple[Gates, Tensor, Tensor, Tensor]:
    """Gates, order [M] of the routed rows, its inverse, and rows per expert [E]."""
    gates = layer.gates(x_ND)
    order_M, inverse_M = permutation(gates.expert_index_NK)
    return gates, order_M, inverse_M, loads(gates.expert_index_NK, len(layer.bias))


def sorted_routing_in_training(layer: MoE, x_ND: Tensor) -> tuple[Gates, Tensor, Tensor, Tensor, Tensor]:
    gates, order_M, inverse_M, load_GE = sorted_routing(layer, x_ND)
    return gates, order_M, inverse_M, load_GE, balance_loss(load_GE, gates.score_NE, layer.gating)


Dispatch = list[tuple[Tensor, ...]]  # choice and token of each expert's rows


def one_hot_dispatch(layer: MoE, x_ND: Tensor) -> tuple[Tensor, Tensor, Tensor, Dispatch]:
    """softmax, top-k, and dispatch from a one-hot mask, as in transformers: scores, weights, mask and rows."""
    score_NE = F.linear(x_ND, layer.router_weight).softmax(dim=-1)
    weight_NK, index_NK = score_NE.topk(layer.experts_per_token, dim=-1)
    weight_NK = weight_NK / weight_NK.sum(dim=-1, keepdim=True)
    mask_EKN = F.one_hot(index_NK, layer.router_weight.shape[0]).permute(2, 1, 0)
    return score_NE, weight_NK, mask_EKN, [torch.where(mask_KN) for mask_KN in mask_EKN]


def one_hot_dispatch_in_training(layer: MoE, x_ND: Tensor) -> tuple[Tensor, Dispatch, Tensor]:
    """With Switch's balance loss from the same mask, as transformers writes it."""
    score_NE, weight_NK, mask_EKN, rows = one_hot_dispatch(layer, x_ND)
    share_EK, mean_E = mask_EKN.float().mean(dim=-1), score_NE.mean(dim=0)
    return weight_NK, rows, (share_EK * mean_E.unsqueeze(1)).sum() * len(mean_E)


@torch.no_grad()
def rows(
    sizes: tuple[tuple[int, int], ...] = ((8, 2), (64, 6)),
    tokens: int = 4096,
    width: int = 256,
    expert_width: int = 512,
    seconds: float = 2.0,
) -> Iterator[Row]:
    """sizes: pairs of experts and experts per token."""
    x_ND = torch.randn(tokens, width, generator=torch.Generator().manual_seed(0)).to(DEVICE)
    for experts, per_token in sizes:
        layer = new_layer(width, expert_width, experts, per_token)
        softmax = MoE(width, expert_width, experts, per_token, 0, "softmax", 1.0).to(DEVICE)
        softmax.load_state_dict(layer.state_dict())
        ours, ours_in_training = sorted_routing, sorted_routing_in_training
        if DEVICE.type == "cuda":
            torch.compiler.reset()
            ours, ours_in_training = (
                torch.compile(routing, mode="reduce-overhead") for routing in (ours, ours_in_training)
            )
        actions: dict[str, Action] = {
            "sigmoid": partial(ours, layer, x_ND),
            "softmax": partial(ours, softmax, x_ND),
            "one-hot": partial(one_hot_dispatch, layer, x_ND),
            "sigmoid, balance loss": partial(ours_in_training, layer, x_ND),
            "softmax, balance loss": partial(ours_in_training, softmax, x_ND),
            "one-hot, balance loss": partial(one_hot_dispatch_in_training, layer, x_ND),
        }
        times = interleaved(actions, seconds, least_rounds=10, most_rounds=300)
        whole = torch.compile(layer.forward, mode="reduce-overhead") if DEVICE.type == "cuda" else layer.forward
        with_layer = interleaved({"sigmoid": actions["sigmoid"], "layer": partial(whole, x_ND.unsqueeze(0))}, seconds)

        def per_1k(seconds: float) -> float:
            return seconds * 1e6 / (tokens / 1000)

        what = f"{experts} experts, top-{per_token}"
        for in_training in ("", ", balance loss"):
            for gating in ("sigmoid", "softmax"):
                yield Row.of(
                    "router",
                    f"{gating}, {what}{in_training}",
                    per_1k(times.median(gating + in_training)),
                    f"softmax + topk + one-hot dispatch{in_training}",
                    per_1k(times.median("one-hot" + in_training)),
                    "µs per 1k tokens",
                    times.ratio("one-hot" + in_training, gating + in_training),
                    times.rounds,
                )
        ratio = with_layer.ratio("sigmoid", "layer")
        yield Row.of(
            "router",
            f"sigmoid, {what}",
            per_1k(with_layer.median("sigmoid")),
            "its layer's forward, float32",
            per_1k(with_layer.median("layer")),
            "µs per 1k tokens",
            ratio,
            with_layer.rounds,
            of_ceiling=True,
        )
