"""The router alone, from hidden states to rows in the order of their experts.

Scores, top-k, weights, permutation: all that the layer does before its first product, load and balance loss
included. On a GPU it is compiled, as in training, and replayed as a CUDA graph, for alone its launches would take
longer than its work; the peer's shapes depend on the data, which neither permits.
"""

from collections.abc import Iterator
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.moe_layer import new_layer
from benchmarks.table import Row
from benchmarks.timing import DEVICE, Action, interleaved
from stages.experts import MoE, load_and_balance, permutation


def sorted_routing(layer: MoE, x_ND: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Weights [N, K], order [M] of the routed rows, its inverse, and rows per expert [E]."""
    gates = layer.gates(x_ND)
    load_E, _ = load_and_balance(gates.expert_index_NK, gates.score_NE, 1, layer.gating)
    order_M, inverse_M = permutation(gates.expert_index_NK)
    return gates.weight_NK, order_M, inverse_M, load_E


def one_hot_dispatch(layer: MoE, x_ND: Tensor) -> tuple[Tensor, list[tuple[Tensor, Tensor]]]:
    """softmax, top-k, and (choice, token) of each expert's rows from a one-hot mask, as in transformers."""
    score_NE = F.linear(x_ND, layer.router_weight).softmax(dim=-1)
    weight_NK, index_NK = score_NE.topk(layer.experts_per_token, dim=-1)
    weight_NK = weight_NK / weight_NK.sum(dim=-1, keepdim=True)
    mask_EKN = F.one_hot(index_NK, layer.router_weight.shape[0]).permute(2, 1, 0)
    return weight_NK, [torch.where(mask_KN) for mask_KN in mask_EKN]


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
        ours = sorted_routing
        if DEVICE.type == "cuda":
            torch.compiler.reset()
            ours = torch.compile(sorted_routing, mode="reduce-overhead")
        actions: dict[str, Action] = {
            "sigmoid": partial(ours, layer, x_ND),
            "softmax": partial(ours, softmax, x_ND),
            "one-hot": partial(one_hot_dispatch, layer, x_ND),
        }
        times = interleaved(actions, seconds, least_rounds=10, most_rounds=300)
        whole = torch.compile(layer.forward, mode="reduce-overhead") if DEVICE.type == "cuda" else layer.forward
        with_layer = interleaved({"sigmoid": actions["sigmoid"], "layer": partial(whole, x_ND.unsqueeze(0))}, seconds)

        def per_1k(seconds: float) -> float:
            return seconds * 1e6 / (tokens / 1000)

        what = f"{experts} experts, top-{per_token}"
        for gating in ("sigmoid", "softmax"):
            yield Row.of(
                "router",
                f"{gating}, {what}",
                per_1k(times.median(gating)),
                "softmax + topk + one-hot dispatch",
                per_1k(times.median("one-hot")),
                "µs per 1k tokens",
                times.ratio("one-hot", gating),
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
