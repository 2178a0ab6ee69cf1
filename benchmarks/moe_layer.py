"""One MoE layer, forward and forward + backward, against a plain PyTorch loop over the experts and against the best of
transformers' implementations: DeepseekV3's layer with our weights, without its shared expert. On a GPU that has it,
against ScatterMoE (Tan et al. 2024, Triton kernels), too, behind our router:

    pip install git+https://github.com/shawntan/scattermoe@47b5e1502e5a10e82c8e5945d761b877849871e7

In bf16 ours and the loop run under autocast, as training does, and pay for casting the weights; the peers have bf16
weights, for under autocast transformers' grouped_mm would run in float32 and ScatterMoE's kernels refuse. So ours is
measured with bf16 weights, too, which is the row of equal numerics.
"""

import copy
import importlib.util
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.ceiling import DTYPES
from benchmarks.peers import peer_models
from benchmarks.table import Row
from benchmarks.timing import DEVICE, Action, heats_and_final
from benchmarks.training_step import REFERENCE
from stages.model.experts import MoE
from stages.model.layers import initialise

LOOP, SCATTERMOE = "plain loop over experts", "ScatterMoE"
Layer = tuple[nn.Module, Callable[[Tensor], Tensor]]  # whose gradients are dropped, and what is called


# On a GPU width and experts as at its scale, and many tokens alone: each layer is compiled, which takes seconds.
WIDTHS, TOKENS = ((1792, 896), (16384,)) if DEVICE.type == "cuda" else ((256, 512), (512, 4096, 16384))


def new_layer(width: int, expert_width: int, experts: int, per_token: int) -> MoE:
    layer = MoE(width, expert_width, experts, per_token, 0, "sigmoid", 1.0)
    initialise(layer, 1, seed=0)
    return layer.to(DEVICE)


def with_bfloat16_experts(layer: MoE) -> MoE:
    """A copy whose experts need no cast; the router stays in float32, as theirs does."""
    cast = copy.deepcopy(layer)
    cast.gate_up.data, cast.down.data = cast.gate_up.data.bfloat16(), cast.down.data.bfloat16()
    return cast


def run_layer(layer: MoE, x_ND: Tensor) -> Tensor:
    return layer(x_ND.unsqueeze(0))[0].squeeze(0)


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


def peer_layers(layer: MoE, tokens: int, dtype: torch.dtype) -> Iterator[tuple[str, Layer] | str]:
    """transformers' layer with our weights, per implementation; a line for each that cannot run here."""
    experts, width, expert_width = layer.down.shape
    shape = replace(
        REFERENCE, layers=1, width=width, experts=experts, expert_width=expert_width,
        experts_per_token=layer.experts_per_token, vocab_size=8,
    )  # fmt: skip
    for peer in peer_models(shape, tokens, ("DeepseekV3",)):
        if isinstance(peer, str):
            yield peer
            continue
        theirs = peer[1]().model.layers[0].mlp
        theirs.experts.load_state_dict({"gate_up_proj": layer.gate_up, "down_proj": layer.down})
        theirs.gate.load_state_dict({"weight": layer.router_weight, "e_score_correction_bias": layer.bias})
        theirs.experts.to(dtype)
        yield peer[0], (theirs, partial(routed_experts, theirs))


def routed_experts(theirs: nn.Module, x_ND: Tensor) -> Tensor:
    """What DeepseekV3MoE.forward does but for the shared expert, which ours has not either."""
    _, weight_NK, index_NK = theirs.gate(x_ND)
    return theirs.experts(x_ND, index_NK, weight_NK)


class ScatterMoE(nn.Module):
    """Our router and weights, the experts' work by ScatterMoE; raises ImportError where it is missing."""

    def __init__(self, layer: MoE, dtype: torch.dtype):
        super().__init__()
        from scattermoe.mlp import GLUMLP

        experts, width, expert_width = layer.down.shape
        self.layer = layer
        self.experts = GLUMLP(width, expert_width, experts, layer.experts_per_token).to(DEVICE, dtype)
        gate, up = layer.gate_up.detach().chunk(2, dim=1)
        self.experts.experts.weight.data.copy_(torch.cat([up, gate], dim=1))  # theirs has the gate's rows last
        self.experts.output_experts.weight.data.copy_(layer.down)

    def forward(self, x_ND: Tensor) -> Tensor:
        gates = self.layer.gates(x_ND)
        x_ND = x_ND.to(self.experts.experts.weight.dtype)
        return self.experts(x_ND, gates.weight_NK.to(x_ND.dtype), gates.expert_index_NK)


def scattermoe_layers(layer: MoE, dtype: torch.dtype) -> dict[str, Layer]:
    if DEVICE.type != "cuda" or importlib.util.find_spec("scattermoe") is None:
        return {}
    theirs = ScatterMoE(layer, dtype)
    return {SCATTERMOE: (theirs, theirs)}


def one_pass(layer: Layer, x_ND: Tensor, grad_ND: Tensor, backward: bool, dtype: torch.dtype) -> None:
    module, call = layer
    x = x_ND.detach().requires_grad_(backward)
    module.zero_grad(set_to_none=True)
    with torch.set_grad_enabled(backward), torch.autocast(DEVICE.type, torch.bfloat16, enabled=dtype == torch.bfloat16):
        y_ND = call(x)
    if backward:
        y_ND.backward(grad_ND.to(y_ND.dtype))


def rows(
    tokens: tuple[int, ...] = TOKENS,
    experts: tuple[int, ...] = (8, 64),
    width: int = WIDTHS[0],
    expert_width: int = WIDTHS[1],
    per_token: int = 2,
    seconds: float = 1.2,
) -> Iterator[Row | str]:
    told: set[str] = set()
    for n_tokens in tokens:
        for n_experts in experts:
            layer = new_layer(width, expert_width, n_experts, per_token)
            for one in rows_of(layer, n_tokens, seconds):
                if isinstance(one, Row) or one not in told:
                    yield one
                told |= {one} if isinstance(one, str) else set()


def rows_of(layer: MoE, tokens: int, seconds: float) -> Iterator[Row | str]:
    generator = torch.Generator().manual_seed(0)
    x_ND, grad_ND = (torch.randn(tokens, layer.down.shape[1], generator=generator).to(DEVICE) for _ in range(2))
    for dtype_name, dtype in DTYPES.items():
        ours = {dtype_name: layer}
        if dtype == torch.bfloat16:
            ours[f"{dtype_name} weights"] = with_bfloat16_experts(layer)
        if DEVICE.type == "cuda":
            torch.compiler.reset()
            for one in ours.values():
                one.compile(dynamic=False)
        layers: dict[str, Layer] = {of: (one, partial(run_layer, one)) for of, one in ours.items()}
        layers[LOOP] = (layer, partial(loop_over_experts, layer))
        layers |= scattermoe_layers(layer, dtype)
        for peer in peer_layers(layer, tokens, dtype):
            if isinstance(peer, str):
                yield peer
            else:
                layers[peer[0]] = peer[1]
        for name, backward in {"forward": False, "forward + backward": True}.items():
            actions: dict[str, Action] = {
                of: partial(one_pass, it, x_ND, grad_ND, backward, dtype) for of, it in layers.items()
            }
            peers = [name for name in layers if name.startswith("transformers")]
            times, best = heats_and_final(actions, peers, seconds, may_fail=[*peers, SCATTERMOE])
            what = f"{name}, {tokens} tokens, {len(layer.down)} experts"
            yield from (f"peer left out: {of}: {what}, {dtype_name}: {why}" for of, why in times.failed.items())
            strong = [peer for peer in (best, SCATTERMOE) if peer and peer in times]
            for mine, against in [(dtype_name, LOOP), *((of, peer) for peer in strong for of in ours)]:
                yield Row.of(
                    "MoE layer",
                    f"{what}, {mine}",
                    times.median(mine) * 1e3,
                    against,
                    times.median(against) * 1e3,
                    "ms",
                    times.ratio(against, mine),
                    times.rounds,
                )
