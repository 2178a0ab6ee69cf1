"""One MoE layer, forward and forward + backward, against a plain PyTorch loop over the experts."""

from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.ceiling import DTYPES
from benchmarks.table import Row
from benchmarks.timing import DEVICE, Action, interleaved
from stages.experts import MoE
from stages.layers import initialise


def new_layer(width: int, expert_width: int, experts: int, per_token: int) -> MoE:
    layer = MoE(width, expert_width, experts, per_token, 0, "sigmoid", 1.0)
    initialise(layer, 1, seed=0)
    return layer.to(DEVICE)


def loop_over_experts(layer: MoE, x_ND: Tensor) -> Tensor:
    """The layer as one would write it by hand, with our weights: gather, three products, scatter-add.

    The weights are unbound once: indexing the stack in the loop would make autograd write a gradient of the
    whole stack for every expert, which no one who writes a list of experts pays.
    """
    with torch.autocast(x_ND.device.type, enabled=False):  # routed in float32, as ours is
        score_NE = F.linear(x_ND, layer.router_weight).sigmoid()
        index_NK = (score_NE + layer.bias).topk(layer.experts_per_token, dim=-1).indices
        weight_NK = score_NE.gather(1, index_NK)
        weight_NK = weight_NK / weight_NK.sum(dim=-1, keepdim=True)
    y_ND = torch.zeros_like(x_ND)
    for expert, weights in enumerate(zip(layer.gate_up.unbind(), layer.down.unbind(), strict=True)):
        token, choice = torch.where(index_NK == expert)
        gate, up = F.linear(x_ND[token], weights[0]).chunk(2, dim=-1)
        y_MD = F.linear(F.silu(gate) * up, weights[1]) * weight_NK[token, choice, None]
        y_ND.index_add_(0, token, y_MD.to(y_ND.dtype))
    return y_ND


def passes(layer: MoE, x_ND: Tensor, dtype: torch.dtype) -> dict[str, dict[str, Action]]:
    """What is timed: {forward, forward + backward} x {ours, loop}."""
    grad_ND = torch.randn_like(x_ND)

    def run(call, backward: bool):
        x = x_ND.detach().requires_grad_(backward)
        layer.zero_grad(set_to_none=True)
        with torch.set_grad_enabled(backward), torch.autocast(
            DEVICE.type, torch.bfloat16, enabled=dtype == torch.bfloat16
        ):
            y_ND = call(x)
        if backward:
            y_ND.backward(grad_ND.to(y_ND.dtype))

    def ours(x):
        return layer(x.unsqueeze(0))[0].squeeze(0)

    def loop(x):
        return loop_over_experts(layer, x)

    return {
        "forward": {"ours": lambda: run(ours, False), "loop": lambda: run(loop, False)},
        "forward + backward": {"ours": lambda: run(ours, True), "loop": lambda: run(loop, True)},
    }


def rows(
    tokens: tuple[int, ...] = (512, 4096),
    experts: tuple[int, ...] = (8, 64),
    width: int = 256,
    expert_width: int = 512,
    per_token: int = 2,
    seconds: float = 1.2,
) -> Iterator[Row]:
    for n_tokens in tokens:
        for n_experts in experts:
            layer = new_layer(width, expert_width, n_experts, per_token)
            x_ND = torch.randn(n_tokens, width, generator=torch.Generator().manual_seed(0)).to(DEVICE)
            for dtype_name, dtype in DTYPES.items():
                for name, actions in passes(layer, x_ND, dtype).items():
                    times = interleaved(actions, seconds, least_rounds=5)
                    yield Row.of(
                        "MoE layer",
                        f"{name}, {n_tokens} tokens, {n_experts} experts, {dtype_name}",
                        times.median("ours") * 1e3,
                        "plain loop over experts",
                        times.median("loop") * 1e3,
                        "ms",
                        times.ratio("loop", "ours"),
                        times.rounds,
                    )
