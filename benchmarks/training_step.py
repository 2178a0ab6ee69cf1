"""The teacher's full training step (forward, backward, AdamW) against transformers' mixtures of experts, and against
its dense Qwen3 of as many operations per token: what the same compute costs without experts.

Every model takes the same fused AdamW, the same precision and the same tokens: at each step others, as in training,
where the experts' loads and with them the sizes of their products change from step to step.
"""

from collections.abc import Callable, Iterator
from functools import partial

import torch
from torch import Tensor, nn

from benchmarks.ceiling import DTYPES, ceiling, ceiling_flops, data_sheet_flops
from benchmarks.peers import peer_model, peer_models, transformers_is_here
from benchmarks.table import Row
from benchmarks.timing import DEVICE, Action, Timings, interleaved, one_by_one
from stages.measure.flops import flops_per_token
from stages.model.families.deepseek_v3.model import DeepseekV3 as Teacher
from stages.model.families.deepseek_v3.model import DeepseekV3Shape as TeacherShape
from stages.model.layers import initialise
from stages.model.operations import Counter
from stages.training.fit import NextToken, compile_blocks, split_targets

# 4 layers, width 256, 8 experts, top-2, expert width 512: what reference points were measured at
REFERENCE = TeacherShape(
    vocab_size=4096, sequence_tokens=256, layers=4, dense_layers=0, width=256, heads=8, nope_head_dim=16,
    rope_head_dim=16, value_head_dim=32, latent_width=64, dense_width=512, experts=8, experts_per_token=2,
    shared_experts=0, expert_width=512, gating="sigmoid", route_scale=1.0, rope_theta=10000.0,
)  # fmt: skip
# the teacher of conf/scale/gpu.yaml
GPU_SCALE = TeacherShape(
    vocab_size=32768, sequence_tokens=2048, layers=10, dense_layers=1, width=1792, heads=14, nope_head_dim=96,
    rope_head_dim=32, value_head_dim=128, latent_width=448, dense_width=4864, experts=16, experts_per_token=4,
    shared_experts=1, expert_width=896, gating="sigmoid", route_scale=1.0, rope_theta=10000.0,
)  # fmt: skip
GPU_BATCHES = 8, 32  # in 80 GB the peers have room for 8 sequences; the scale has 32
SHAPE, BATCHES = (GPU_SCALE, GPU_BATCHES) if DEVICE.type == "cuda" else (REFERENCE, (16,))
LEARNING_RATE = 3e-4
BALANCE_LOSS_WEIGHT, BIAS_UPDATE_RATE = 1e-4, 1e-3
DENSE = "transformers Qwen3, dense, equal operations"

Step = Callable[[], Tensor]  # takes one optimizer step, returns the loss before it


def new_teacher(shape: TeacherShape) -> Teacher:
    with DEVICE:
        teacher = Teacher(shape)
    initialise(teacher, shape.layers, seed=0)
    return teacher


def batches(shape: TeacherShape, sequences: int) -> Iterator[Tensor]:
    """Random tokens [B, T+1] without end, the same for everybody who asks."""
    generator = torch.Generator().manual_seed(0)
    while True:
        size = sequences, shape.sequence_tokens + 1
        yield torch.randint(shape.vocab_size, size, generator=generator).to(DEVICE)


def teacher_step(model: Teacher, tokens: Iterator[Tensor], dtype: torch.dtype) -> Step:
    """What a rank of `pretrain` does in a step, balancing included, with AdamW for every weight."""
    if DEVICE.type == "cuda":
        compile_blocks(model)
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


def peers_of(
    shape: TeacherShape, sequences: int, dtype: torch.dtype
) -> Iterator[tuple[str, Callable[[], Step]] | str]:
    """Name and maker of each peer's step. A GPU has one more: DeepseekV3 with weights and optimizer in bf16, which
    saves casting but has no float32 copy of the weights, as all others have."""

    def maker(make: Callable[[], nn.Module], all_in: torch.dtype = torch.float32) -> Callable[[], Step]:
        return lambda: peer_step(make().to(all_in), batches(shape, sequences), dtype)

    for peer in peer_models(shape, sequences * shape.sequence_tokens, ("Mixtral", "DeepseekV3")):
        if isinstance(peer, str):
            yield peer
            continue
        name, make = peer
        yield name, maker(make)
        if DEVICE.type == "cuda" and name == "transformers DeepseekV3 grouped_mm":
            yield f"{name}, all in bf16", maker(make, all_in=torch.bfloat16)
    if transformers_is_here():
        yield DENSE, maker(partial(peer_model, "Qwen3", "", shape))


def forward_flops(model: nn.Module, shape: TeacherShape) -> int:
    tokens_BT = torch.arange(shape.sequence_tokens, device=DEVICE)[None] % shape.vocab_size
    with Counter() as counter, torch.no_grad():
        model(tokens_BT)
    return counter.get_total_flops()


def extra_work(shape: TeacherShape) -> Iterator[str]:
    """Says how unequal the work is: Mixtral's attention is not latent, and it has neither dense layers nor shared
    experts."""
    if not transformers_is_here():
        return
    peer = peer_model("Mixtral", "eager", shape)
    more = forward_flops(peer, shape) / forward_flops(new_teacher(shape), shape) - 1
    yield f"Mixtral runs {more:+.0%} operations per token against our teacher, DeepseekV3 the same number"


def rows(
    shape: TeacherShape = SHAPE,
    sequences: tuple[int, ...] = BATCHES,
    seconds: float = 30.0,
    least_rounds: int = 9,
    warm_up: int = 5,
) -> Iterator[Row | str]:
    """Per data type and batch: tokens per second against each peer, for the first batch, and share of the ceiling."""
    yield from extra_work(shape)
    for dtype_name, dtype in DTYPES.items():
        peers: dict[str, Callable[[], Step]] = {}
        for peer in peers_of(shape, sequences[0], dtype):
            if not isinstance(peer, str):
                peers[peer[0]] = peer[1]
            elif dtype == next(iter(DTYPES.values())):  # told once, not per data type
                yield peer
        for batch in sequences:
            against = peers if batch == sequences[0] else {}
            times = timings(shape, batch, dtype, against, seconds, least_rounds, warm_up)
            yield from (f"peer left out: {name} in {dtype_name}: {why}" for name, why in times.failed.items())
            what = f"teacher, {batch} x {shape.sequence_tokens} tokens, {dtype_name}"
            tokens = batch * shape.sequence_tokens
            for name in filter(times.__contains__, against):
                yield against_peer(what, times, name, tokens)
            yield from shares(what, times, 3 * tokens * flops_per_token(shape, shape.sequence_tokens)["total"])


def timings(
    shape: TeacherShape,
    batch: int,
    dtype: torch.dtype,
    peers: dict[str, Callable[[], Step]],
    seconds: float,
    least_rounds: int,
    warm_up: int,
) -> Timings:
    makers: dict[str, Callable[[], Action]] = {
        "ours": lambda: teacher_step(new_teacher(shape), batches(shape, batch), dtype),
        "ceiling": lambda: ceiling(dtype),
        **peers,
    }
    if DEVICE.type == "cuda":
        return one_by_one(makers, rounds=6, warm_up=3, may_fail=peers)
    actions = {name: make() for name, make in makers.items()}
    return interleaved(actions, seconds, least_rounds, may_fail=peers, warm_up=warm_up)


def against_peer(what: str, times: Timings, peer: str, tokens: int) -> Row:
    ours, theirs = tokens / times.median("ours"), tokens / times.median(peer)
    return Row.of("training step", what, ours, peer, theirs, "tokens/s", times.ratio(peer, "ours"), times.rounds)


def shares(what: str, times: Timings, flops: float) -> Iterator[Row]:
    """Of what the matrix units did in the same rounds, and of what a GPU's data sheet promises: its model FLOPs
    utilisation. `flops` are a step's, the backward pass counted as twice the forward."""
    longer = flops / ceiling_flops()
    bounds = {f"matmul ceiling, {what.split()[-1]}": [longer * seconds for seconds in times.seconds["ceiling"]]}
    if promised := data_sheet_flops():
        bounds["the GPU's data sheet"] = [flops / promised] * times.rounds
    both = Timings(times.seconds | bounds, {})
    for name in bounds:
        rates = (flops / both.median(action) / 1e9 for action in ("ours", name))
        ratio = both.ratio(name, "ours")
        yield Row.of("training step", what, next(rates), name, next(rates), "GFLOP/s", ratio, times.rounds, True)
