"""The teacher's full training step (forward, backward, AdamW) against transformers' mixtures of experts, and against
its dense Qwen3 of as many operations per token: what the same compute costs without experts.

Every model takes the same fused AdamW, the same precision and the same tokens: at each step others, as in training,
where the experts' loads and with them the sizes of their products change from step to step.
"""

import contextlib
from collections.abc import Callable, Iterator

import torch
from torch import Tensor, nn

from benchmarks.ceiling import DTYPES, ceiling
from benchmarks.peers import peer_model, peer_models
from benchmarks.table import Row
from benchmarks.timing import DEVICE, Ratio, interleaved
from stages.cost import Counter, flops_per_token
from stages.layers import initialise
from stages.teacher import Teacher, TeacherShape
from stages.training import NextToken, split_targets

# 4 layers, width 256, 8 experts, top-2, expert width 512: what reference points were measured at
REFERENCE = TeacherShape(
    vocab_size=4096, sequence_tokens=256, layers=4, dense_layers=0, width=256, heads=8, nope_head_dim=16,
    rope_head_dim=16, value_head_dim=32, latent_width=64, dense_width=512, experts=8, experts_per_token=2,
    shared_experts=0, expert_width=512, gating="sigmoid", route_scale=1.0, rope_theta=10000.0,
)  # fmt: skip
SEQUENCES = 16
LEARNING_RATE = 3e-4
BALANCE_LOSS_WEIGHT, BIAS_UPDATE_RATE = 1e-4, 1e-3
DENSE = "transformers Qwen3, dense, equal operations"

Step = Callable[[], Tensor]  # takes one optimizer step, returns the loss before it


def new_teacher(shape: TeacherShape) -> Teacher:
    teacher = Teacher(shape)
    initialise(teacher, shape.layers, seed=0)
    return teacher.to(DEVICE)


def batches(shape: TeacherShape, sequences: int) -> Iterator[Tensor]:
    """Random tokens [B, T+1] without end, the same for everybody who asks."""
    generator = torch.Generator().manual_seed(0)
    while True:
        size = sequences, shape.sequence_tokens + 1
        yield torch.randint(shape.vocab_size, size, generator=generator).to(DEVICE)


def teacher_step(model: Teacher, tokens: Iterator[Tensor], dtype: torch.dtype) -> Step:
    """What a rank of `pretrain` does in a step, balancing included, with AdamW for every weight."""
    objective = NextToken(BALANCE_LOSS_WEIGHT)

    def forward() -> tuple[Tensor, Tensor]:
        outcome = objective(model, next(tokens))
        model.balance(outcome.loads, BIAS_UPDATE_RATE)
        return outcome.loss, outcome.parts["cross_entropy"]

    return _step(model, forward, dtype)


def peer_step(model: nn.Module, tokens: Iterator[Tensor], dtype: torch.dtype) -> Step:
    def forward() -> tuple[Tensor, Tensor]:
        inputs_BT, targets_N = split_targets(next(tokens))
        targets_BT = targets_N.view_as(inputs_BT)
        loss = model(inputs_BT, labels=targets_BT, shift_labels=targets_BT, use_cache=False).loss
        return loss, loss.detach()

    return _step(model, forward, dtype)


def _step(model: nn.Module, forward: Callable[[], tuple[Tensor, Tensor]], dtype: torch.dtype) -> Step:
    optimizer = torch.optim.AdamW(model.train().parameters(), lr=LEARNING_RATE, fused=True)

    def step() -> Tensor:
        with torch.autocast(DEVICE.type, torch.bfloat16, enabled=dtype == torch.bfloat16):
            loss, cross_entropy = forward()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return cross_entropy

    return step


def peers_of(shape: TeacherShape, tokens: int) -> Iterator[tuple[str, nn.Module] | str]:
    yield from peer_models(shape, tokens, ("Mixtral", "DeepseekV3"))
    with contextlib.suppress(ImportError):  # the mixtures of experts have said so
        yield DENSE, peer_model("Qwen3", "", shape)


def forward_flops(model: nn.Module, shape: TeacherShape) -> int:
    tokens_BT = torch.arange(shape.sequence_tokens, device=DEVICE)[None] % shape.vocab_size
    with Counter() as counter, torch.no_grad():
        model(tokens_BT)
    return counter.get_total_flops()


def extra_work(shape: TeacherShape) -> Iterator[str]:
    """Says how unequal the work is: Mixtral's attention is not latent."""
    try:
        peer = peer_model("Mixtral", "eager", shape)
    except ImportError:
        return
    more = forward_flops(peer, shape) / forward_flops(new_teacher(shape), shape) - 1
    yield f"Mixtral runs {more:+.0%} operations per token against our teacher, DeepseekV3 the same number"


def rows(
    shape: TeacherShape = REFERENCE,
    sequences: int = SEQUENCES,
    seconds: float = 30.0,
    least_rounds: int = 4,
    warm_up: int = 5,
) -> Iterator[Row | str]:
    """Per data type: tokens per second against each peer, and the share of the matmul ceiling."""
    tokens = sequences * shape.sequence_tokens
    flops = 3 * tokens * flops_per_token(shape, shape.sequence_tokens)["total"]  # backward is twice forward
    yield from extra_work(shape)
    for dtype_name, dtype in DTYPES.items():
        bound, bound_flops = ceiling(dtype)
        actions = {"ours": teacher_step(new_teacher(shape), batches(shape, sequences), dtype), "ceiling": bound}
        for peer in peers_of(shape, tokens):
            if isinstance(peer, str):
                if dtype_name == "float32":  # told once, not per data type
                    yield peer
            else:
                actions[peer[0]] = peer_step(peer[1], batches(shape, sequences), dtype)
        peers = list(actions)[2:]
        times = interleaved(actions, seconds, least_rounds, may_fail=peers, warm_up=warm_up)
        yield from (f"peer left out: {name} in {dtype_name}: {why}" for name, why in times.failed.items())
        ours = tokens / times.median("ours")
        group, what = "training step", f"teacher, {dtype_name}"
        for peer in filter(times.__contains__, peers):
            theirs, ratio = tokens / times.median(peer), times.ratio(peer, "ours")
            yield Row.of(group, what, ours, peer, theirs, "tokens/s", ratio, times.rounds)
        share = times.ratio("ceiling", "ours")
        scale = flops / bound_flops
        yield Row.of(
            group,
            what,
            flops / times.median("ours") / 1e9,
            f"matmul ceiling, {dtype_name}",
            bound_flops / times.median("ceiling") / 1e9,
            "GFLOP/s",
            Ratio(share.ratio * scale, share.low * scale, share.high * scale),
            times.rounds,
            of_ceiling=True,
        )
