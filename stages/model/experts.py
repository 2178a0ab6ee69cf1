"""The mixture of experts: a float32 router, its balancing, and the experts. How they are computed: `kernels/`.

Shape legend: B sequences, T tokens of a sequence, N = B*T tokens, K experts per token, G groups of tokens, E experts,
D width, F width of an expert.

Routing is returned from forward and nothing is stored on the module, so running a block twice (activation
checkpointing) cannot count a token twice.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from stages.model.kernels.experts import routed_experts
from stages.model.kernels.routing import chosen_scores, loads, softmax_over_experts, top_experts
from stages.model.kernels.threads import one_thread
from stages.model.layers import SwiGLU, for_matmuls


class Routing(NamedTuple):
    expert_index_NK: Tensor  # E where a token takes fewer than K experts
    load_E: Tensor  # float32 count of tokens that each expert received in this forward
    balance_loss: Tensor | None  # scalar, 1 where the load is even; None where no gradient is wanted


class Gates(NamedTuple):
    weight_NK: Tensor  # float32, sums to route_scale over K
    expert_index_NK: Tensor
    score_NE: Tensor  # affinities before the bias


def route(
    x_ND: Tensor,
    router_weight_ED: Tensor,
    bias_E: Tensor,
    experts_per_token: int,
    gating: str,
    route_scale: float,
) -> Gates:
    """Chooses experts_per_token experts for each token and their weights, in float32 even under autocast.

    sigmoid (DeepSeek-V3, eq. 13-16): the bias takes part in the choice, never in the weight.
    softmax (Shazeer et al. 2017, over all experts): no bias; balance comes from the auxiliary loss.
    Both renormalise the chosen scores to sum to one, then multiply by route_scale.
    """
    with torch.autocast(x_ND.device.type, enabled=False):
        logit_NE = F.linear(x_ND.float(), router_weight_ED.float())
        with one_thread(x_ND.device):
            if gating == "sigmoid":
                score_NE = logit_NE.sigmoid()
                index_NK = top_experts(score_NE.detach() + bias_E, experts_per_token)
            else:
                score_NE = softmax_over_experts(logit_NE)
                index_NK = top_experts(score_NE.detach(), experts_per_token)
            chosen_NK = chosen_scores(score_NE, index_NK)
            # 1e-20 as in DeepSeek's own code: chosen sigmoids that all underflow must not divide by zero
            weight_NK = chosen_NK / (chosen_NK.sum(dim=-1, keepdim=True) + 1e-20) * route_scale
    return Gates(weight_NK, index_NK, score_NE)


def share_before(weight_NK: Tensor) -> Tensor:
    """Of each chosen expert: the share of the token's gate weight that its heavier experts hold, 0 for the heaviest."""
    heavy_NK, order_NK = weight_NK.sort(dim=-1, descending=True, stable=True)
    before_NK = (heavy_NK.cumsum(dim=-1) - heavy_NK) / heavy_NK.sum(dim=-1, keepdim=True).clamp(min=1e-20)
    return torch.empty_like(before_NK).scatter_(-1, order_NK, before_NK)


def confident(gates: Gates, gate_mass: float) -> Gates:
    """Only the heaviest experts of a token, up to the one with which they hold `gate_mass` of its weight (top-p).

    Huang et al. 2024, "Harder Tasks Need More Experts", there over all experts, here over the K chosen ones. What is
    left keeps the sum of weights. An expert that goes gets the index E and the weight 0.
    """
    stays_NK = share_before(gates.weight_NK.detach()) < gate_mass
    total_N1 = gates.weight_NK.sum(dim=-1, keepdim=True)
    weight_NK = gates.weight_NK * stays_NK
    weight_NK = weight_NK * (total_N1 / weight_NK.sum(dim=-1, keepdim=True).clamp(min=1e-20))
    index_NK = torch.where(stays_NK, gates.expert_index_NK, gates.score_NE.shape[-1])
    return Gates(weight_NK, index_NK, gates.score_NE)


def balance_loss(load_GE: Tensor, score_NE: Tensor, gating: str) -> Tensor:
    """The mean over groups of sum_e f_e P_e, where f is an expert's load over the mean load and P its mean score.
    Gradients flow through P alone.

    sigmoid: DeepSeek-V3 eq. 17-20, each sequence a group; f counts the routing taken, bias included.
    softmax: the classic loss of GShard and Switch, the whole batch one group.
    """
    with one_thread(score_NE.device):
        if gating == "sigmoid":
            score_NE = score_NE / (score_NE.sum(dim=-1, keepdim=True) + 1e-20)
        mean_GE = score_NE.unflatten(0, (len(load_GE), -1)).mean(dim=1)
        share_GE = load_GE / load_GE.mean(dim=-1, keepdim=True)
        return (share_GE * mean_GE).sum(dim=-1).mean()


def balanced_bias(bias_E: Tensor, load_E: Tensor, rate: float) -> Tensor:
    """Auxiliary-loss-free balancing (Wang et al. 2024): a step up for the underloaded, down for the rest.

    Centred, so that the biases cannot drift together: only their differences choose experts.
    """
    step_E = rate * torch.sign(load_E.mean() - load_E)
    return bias_E + step_E - step_E.mean()


class MoE(nn.Module):
    """DeepSeekMoE: shared experts for every token (one SwiGLU of their joint width) plus routed experts.

    Weights lie as nn.Linear has them: gate_up [E, 2F, D] with the gate's rows first, down [E, D, F].
    """

    def __init__(
        self,
        width: int,
        expert_width: int,
        experts: int,
        experts_per_token: int,
        shared_experts: int,
        gating: str,
        route_scale: float,
        gate_mass: float = 1.0,
    ):
        super().__init__()
        self.router_weight = nn.Parameter(torch.empty(experts, width))
        self.register_buffer("bias", torch.zeros(experts))
        self.gate_up = nn.Parameter(torch.empty(experts, 2 * expert_width, width))
        self.down = nn.Parameter(torch.empty(experts, width, expert_width))
        self.shared = SwiGLU(width, shared_experts * expert_width) if shared_experts else None
        self.experts_per_token = experts_per_token
        self.gating = gating
        self.route_scale = route_scale
        self.gate_mass = gate_mass

    def gates(self, x_ND: Tensor) -> Gates:
        return route(
            x_ND, self.router_weight, self.bias, self.experts_per_token, self.gating, self.route_scale
        )

    def forward(self, x_BTD: Tensor) -> tuple[Tensor, Routing]:
        x_ND = x_BTD.reshape(-1, x_BTD.shape[-1])
        gates = self.gates(x_ND)
        experts, nobody = len(self.bias), 0
        if self.gate_mass < 1:
            gates, nobody = confident(gates, self.gate_mass), 1  # one more to count what no expert takes
        groups = x_BTD.shape[0] if self.gating == "sigmoid" else 1
        counted_GE = loads(gates.expert_index_NK, experts + nobody, groups)
        counted_E, load_GE = counted_GE.sum(dim=0), counted_GE[:, :experts]
        balance = balance_loss(load_GE, gates.score_NE, self.gating) if torch.is_grad_enabled() else None
        x_ND = for_matmuls(x_ND)
        y_ND = routed_experts(x_ND, gates.weight_NK, self.gate_up, self.down, gates.expert_index_NK, counted_E)
        if self.shared is not None:
            y_ND = y_ND + self.shared(x_ND)
        return y_ND.view_as(x_BTD), Routing(gates.expert_index_NK, counted_E[:experts], balance)
