"""What `benchmarks.recipe` compares: the default recipe and, one change at a time, what else one could train with.

A recipe is everything between the data and the loss. What the product has no setting for is built here, around its
own modules: query and key norms, multi-token prediction, other initialisations, other orthogonalisations.

Shapes: B sequences, T tokens, D width, H heads, d query or key head, U value head, N = B*T, V vocabulary.
"""

import math
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from unittest import mock

import torch
from torch import Tensor, nn

from stages.measure.flops import flops_per_token
from stages.model.families.deepseek_v3.model import Block, LatentAttention
from stages.model.families.deepseek_v3.model import DeepseekV3 as Teacher
from stages.model.families.deepseek_v3.model import DeepseekV3Shape as TeacherShape
from stages.model.hub import build_teacher
from stages.model.layers import RMSNorm, Rope, attend, for_matmuls, initialise, rope_table, rotate
from stages.model.losses import next_token
from stages.settings.schema import Optimizer, Settings
from stages.training import optimizers
from stages.training.fit import NextToken, Outcome, add_balance_loss, split_targets
from stages.training.optimizers import learning_rate_factor, make_optimizer

MUON = 3.4445, -4.7750, 2.0315  # a, b, c of each of its five iterations (Jordan et al. 2024)


@dataclass(frozen=True)
class Recipe:
    shape: TeacherShape
    optimizer: Optimizer
    batch_sequences: int
    bias_update_rate: float
    balance_loss_weight: float
    gradient_clip_val: float | None
    init_scale: float = 1.0  # of every matrix
    embedding_scale: float = 1.0
    residual_scale: float = 1.0  # of the matrices that write to the residual stream
    logit_scale: float = 1.0  # of the final norm's weight at the start
    query_key_norm: bool = False
    ahead_weight: float = 0.0  # of the loss on the token after the next; 0: no multi-token prediction
    coefficients: tuple = optimizers.COEFFICIENTS  # of Muon's iterations
    adamw_epsilon: float = 1e-8
    plain: bool = False  # AdamW for every weight
    cosine: bool = False  # instead of warm-up, plateau, linear decay


def default_recipe(settings: Settings, vocab_size: int) -> Recipe:
    teacher = settings.teacher
    return Recipe(
        build_teacher(teacher, vocab_size, settings.sequence_tokens, settings.seed).shape,
        settings.optimizer,
        settings.pretrain.batch_sequences,
        teacher.bias_update_rate,
        teacher.balance_loss_weight,
        settings.trainer.gradient_clip_val,
    )


def dense_twin(shape: TeacherShape) -> TeacherShape:
    """A dense model whose forward pass costs a token as much: the width of its MLPs is solved for."""
    T = shape.sequence_tokens
    narrow, wide = (replace(shape, dense_layers=shape.layers, dense_width=width) for width in (0, 1))
    of_none, of_one = (flops_per_token(one, T)["total"] for one in (narrow, wide))
    width = (flops_per_token(shape, T)["total"] - of_none) / (of_one - of_none)
    return replace(wide, dense_width=8 * round(width / 8))  # whole registers: an odd width would slow it down


def plain_adamw(recipe: Recipe, learning_rate: float, **changes) -> Recipe:
    """What most people would start from, whatever the default becomes; its rate is tuned."""
    values = {
        "muon_learning_rate": 0.0,
        "adamw_learning_rate": learning_rate,
        "weight_decay": 0.1,
        "warmup_share": 0.05,
        "decay_share": 0.5,
    }
    optimizer = recipe.optimizer.model_copy(update=values)
    return replace(recipe, plain=True, optimizer=optimizer, batch_sequences=8, **changes)


def variants(default: Recipe) -> dict[str, Recipe]:
    """By name; what equals the default is left out."""
    o = default.optimizer

    def tuned(**changes) -> Recipe:
        return replace(default, optimizer=o.model_copy(update=changes))

    found = {"default": default, "dense twin": replace(default, shape=dense_twin(default.shape))}
    for rate in (1e-3, 2e-3, 4e-3):
        found[f"plain AdamW {rate:g}"] = plain_adamw(default, rate)
    for rate in (2e-3, 4e-3):
        found[f"plain AdamW {rate:g}, cosine"] = plain_adamw(default, rate, cosine=True)
    for factor in (0.5, 2.0):
        found[f"Muon's rate x {factor:g}"] = tuned(muon_learning_rate=o.muon_learning_rate * factor)
        found[f"AdamW's rate x {factor:g}"] = tuned(adamw_learning_rate=o.adamw_learning_rate * factor)
        found[f"initial std x {factor:g}"] = replace(default, init_scale=factor)
    for decay in (0.0, 0.1):
        found[f"weight decay {decay:g}"] = tuned(weight_decay=decay)
    for share in (0.01, 0.1):
        found[f"warm-up share {share:g}"] = tuned(warmup_share=share)
    for share in (0.25, 0.75, 1.0):
        found[f"decay share {share:g}"] = tuned(decay_share=share)
    for momentum in (0.9, 0.97):
        found[f"Muon's momentum {momentum:g}"] = tuned(muon_momentum=momentum)
    for sequences in (4, 8, 16):
        found[f"batch of {sequences}"] = replace(default, batch_sequences=sequences)
    for iterations in (3, 5):
        found[f"{iterations} of Muon's iterations"] = replace(default, coefficients=(MUON,) * iterations)
    for scale in (0.2, 2.0):
        found[f"embedding's std x {scale:g}"] = replace(default, embedding_scale=scale)
    for scale in (2.5, 4.0):
        found[f"route scale {scale:g}"] = replace(default, shape=replace(default.shape, route_scale=scale))
    found["balancing x 10"] = replace(default, bias_update_rate=default.bias_update_rate * 10)
    found["residual matrices from zero"] = replace(default, residual_scale=0.0)
    found["residual matrices unscaled"] = replace(default, residual_scale=math.sqrt(2 * default.shape.layers))
    for scale in (0.5, 2.0):
        found[f"logit scale {scale:g}"] = replace(default, logit_scale=scale)
    found["AdamW's epsilon 1e-10"] = replace(default, adamw_epsilon=1e-10)
    found["query and key norm"] = replace(default, query_key_norm=True)
    for weight in (0.1, 0.3):
        found[f"multi-token prediction {weight:g}"] = replace(default, ahead_weight=weight)
    return {name: recipe for name, recipe in found.items() if name == "default" or recipe != default}


# ---- what the product does not have ------------------------------------------------------------------------


class NormedAttention(LatentAttention):
    """Latent attention whose query and key heads are normed, for training only. DeepseekV3 has no such norm."""

    def __init__(self, shape: TeacherShape):
        super().__init__(shape)
        self.query_norm = RMSNorm(self.nope + self.rope_dim)
        self.key_norm = RMSNorm(self.nope + self.rope_dim)

    def forward(self, x_BTD: Tensor, rope: Rope, cache=None) -> Tensor:
        B, T, _ = x_BTD.shape
        x_BTD = for_matmuls(x_BTD)
        query_BTHd = self.query(x_BTD).view(B, T, self.heads, -1)
        latent_BTC, key_rope = self.latent_down(x_BTD).split([self.latent_width, self.rope_dim], dim=-1)
        up_BTHd = self.latent_up(self.latent_norm(latent_BTC)).view(B, T, self.heads, -1)
        key_nope, value_BTHU = up_BTHd.split([self.nope, self.value_dim], dim=-1)
        key_BTHd = torch.cat([key_nope, key_rope.unsqueeze(2).expand(-1, -1, self.heads, -1)], dim=-1)

        def normed(part_BTHd: Tensor, norm: RMSNorm) -> Tensor:
            plain, rotated = norm(part_BTHd).to(value_BTHU.dtype).split([self.nope, self.rope_dim], dim=-1)
            return torch.cat([plain, rotate(rotated, rope)], dim=-1).transpose(1, 2)

        query, key = normed(query_BTHd, self.query_norm), normed(key_BTHd, self.key_norm)
        out_BHTU = attend(query, key, value_BTHU.transpose(1, 2), self.scale)
        return self.output(out_BHTU.transpose(1, 2).reshape(B, T, -1))


class Ahead(nn.Module):
    """One depth of multi-token prediction (DeepSeek-V3, 2.2): a block on what is known and the next token.

    h'_i = Block(M [norm(h_i); norm(embedding(t_{i+1}))]) predicts t_{i+2} through the model's own head. The block
    is dense, as wide as a token's own share of a mixture's layer.
    """

    def __init__(self, shape: TeacherShape):
        super().__init__()
        self.known_norm, self.next_norm, self.norm = (RMSNorm(shape.width) for _ in range(3))
        self.join = nn.Linear(2 * shape.width, shape.width, bias=False)
        self.block = Block(shape, 0)

    def forward(self, x_BTD: Tensor, next_BTD: Tensor, rope: Rope) -> Tensor:
        joined_BTD = self.join(torch.cat([self.known_norm(x_BTD), self.next_norm(next_BTD)], dim=-1))
        return self.norm(self.block(joined_BTD, rope)[0])


class TwoTokens(NextToken):
    """The loss on the next token, and `weight` times that on the token after it."""

    def __init__(self, balance_loss_weight: float, weight: float):
        super().__init__(balance_loss_weight)
        self.weight = weight

    def __call__(self, model: nn.Module, tokens_BT1: Tensor) -> Outcome:
        inputs_BT, targets_N = split_targets(tokens_BT1)
        x_BTD, routings, _ = model.features(inputs_BT)
        cross_entropy = next_token(x_BTD.flatten(0, 1), model.head.weight, targets_N)
        rope = rope_table(0, inputs_BT.shape[1] - 1, model.shape.rope_head_dim, model.shape.rope_theta, x_BTD.device)
        ahead_BTD = model.ahead(x_BTD[:, :-1], model.embedding(inputs_BT[:, 1:]), rope)
        ahead = next_token(ahead_BTD.flatten(0, 1), model.head.weight, tokens_BT1[:, 2:].reshape(-1))
        loss, _ = add_balance_loss(cross_entropy + self.weight * ahead, routings, self.balance_loss_weight)
        return Outcome(loss, {"cross_entropy": cross_entropy.detach()}, [r.load_E for r in routings])


def new_model(recipe: Recipe, seed: int) -> Teacher:
    model, shape = Teacher(recipe.shape), recipe.shape
    if recipe.query_key_norm:
        for block in model.blocks:
            block.attention = NormedAttention(shape)
    if recipe.ahead_weight:
        model.ahead = Ahead(replace(shape, dense_layers=1))
    initialise(model, shape.layers, seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.ndim > 1:
                parameter.mul_(recipe.init_scale)
            if ".output." in name or name.removesuffix(".weight").endswith(".down"):
                parameter.mul_(recipe.residual_scale)
        model.embedding.weight.mul_(recipe.embedding_scale)
        model.norm.weight.mul_(recipe.logit_scale)
    return model.train()


def new_optimizers(recipe: Recipe, model: nn.Module) -> list[torch.optim.Optimizer]:
    o = recipe.optimizer
    if not recipe.plain:
        optimizer = make_optimizer(model, o, 1.0)
        for group in optimizer.param_groups:
            group["eps"] = recipe.adamw_epsilon
        return [optimizer]
    matrices, vectors = ([p for p in model.parameters() if (p.ndim > 1) == wide] for wide in (True, False))
    groups = [{"params": matrices, "weight_decay": o.weight_decay}, {"params": vectors, "weight_decay": 0.0}]
    adamw = torch.optim.AdamW(groups, lr=o.adamw_learning_rate, betas=(o.adamw_beta1, o.adamw_beta2), fused=True)
    for group in adamw.param_groups:
        group["initial_lr"] = group["lr"]
    return [adamw]


def new_objective(recipe: Recipe) -> NextToken:
    if recipe.ahead_weight:
        return TwoTokens(recipe.balance_loss_weight, recipe.ahead_weight)
    return NextToken(recipe.balance_loss_weight)


def rate_factor(recipe: Recipe, step: int, steps: int) -> float:
    o = recipe.optimizer
    if not recipe.cosine:
        return learning_rate_factor(step, steps, o.warmup_share, o.decay_share)
    warmup = max(1, round(steps * o.warmup_share))
    turn = math.pi * max(0, step + 1 - warmup) / max(1, steps - warmup)
    return min((step + 1) / warmup, 0.55 + 0.45 * math.cos(turn))  # to a tenth, as GPT-3 has it


def orthogonalisation(recipe: Recipe) -> AbstractContextManager:
    """Within it, Muon iterates as the recipe says."""
    return mock.patch.object(optimizers, "COEFFICIENTS", recipe.coefficients)
