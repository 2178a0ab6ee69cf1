"""The teacher's full training step (forward, backward, AdamW) against transformers' mixtures of experts.

Every step of one data type takes the same tokens, the same fused AdamW and the same precision. DeepseekV3 is
our architecture and, given our weights, our numbers (tests/test_benchmarks.py); Mixtral has the same experts
under grouped-query attention.
"""

import warnings
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from torch import Tensor, nn

from benchmarks.ceiling import DTYPES, ceiling
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
EXPERTS_IMPLEMENTATIONS = ("eager", "grouped_mm", "batched_mm")
INSTALL = "peer left out: transformers is not installed; get it with `make env` or pip install -e '.[test]'"

Step = Callable[[], Tensor]  # takes one optimizer step, returns the loss before it


def new_teacher(shape: TeacherShape) -> Teacher:
    teacher = Teacher(shape)
    initialise(teacher, shape.layers, seed=0)
    return teacher.to(DEVICE)


def teacher_step(model: Teacher, tokens_BT1: Tensor, dtype: torch.dtype) -> Step:
    """What a rank of `pretrain` does in a step, balancing included, with AdamW for every weight."""
    objective = NextToken(BALANCE_LOSS_WEIGHT)

    def forward() -> tuple[Tensor, Tensor]:
        outcome = objective(model, tokens_BT1)
        model.balance(outcome.loads, BIAS_UPDATE_RATE)
        return outcome.loss, outcome.parts["cross_entropy"]

    return _step(model, forward, dtype)


def peer_step(model: nn.Module, tokens_BT1: Tensor, dtype: torch.dtype) -> Step:
    inputs_BT, targets_N = split_targets(tokens_BT1)
    targets_BT = targets_N.view_as(inputs_BT)

    def forward() -> tuple[Tensor, Tensor]:
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


def peer_model(kind: str, implementation: str, shape: TeacherShape) -> nn.Module:
    """transformers' model of the same experts; raises ImportError where transformers is missing."""
    import transformers

    common = {
        "vocab_size": shape.vocab_size, "max_position_embeddings": shape.sequence_tokens,
        "hidden_size": shape.width, "num_hidden_layers": shape.layers, "num_attention_heads": shape.heads,
        "num_key_value_heads": shape.heads, "num_experts_per_tok": shape.experts_per_token,
    }  # fmt: skip
    if kind == "Mixtral":
        model_type = transformers.MixtralForCausalLM
        config = transformers.MixtralConfig(
            num_local_experts=shape.experts, intermediate_size=shape.expert_width, **common
        )
    else:
        model_type = transformers.DeepseekV3ForCausalLM
        config = transformers.DeepseekV3Config(
            n_routed_experts=shape.experts, moe_intermediate_size=shape.expert_width, n_shared_experts=0,
            intermediate_size=shape.dense_width, first_k_dense_replace=0, n_group=1, topk_group=1,
            routed_scaling_factor=shape.route_scale, q_lora_rank=None, kv_lora_rank=shape.latent_width,
            qk_nope_head_dim=shape.nope_head_dim, qk_rope_head_dim=shape.rope_head_dim,
            v_head_dim=shape.value_head_dim, num_nextn_predict_layers=0, **common,
        )  # fmt: skip
    with warnings.catch_warnings():  # a shared expert of width 0 warns that there is nothing to initialise
        warnings.simplefilter("ignore")
        return model_type._from_config(config, experts_implementation=implementation).to(DEVICE)


def batched_mm_bytes(shape: TeacherShape, tokens: int) -> int:
    """batched_mm copies the expert's weights for every routed row and keeps them for the backward pass."""
    return 12 * shape.expert_width * shape.width * shape.experts_per_token * tokens * shape.layers


def free_bytes() -> int:
    if DEVICE.type == "cuda":
        return torch.cuda.mem_get_info()[0]
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
        return 1024 * next(int(line.split()[1]) for line in lines if line.startswith("MemAvailable"))
    except (OSError, StopIteration):
        return 8 * 2**30


def peer_models(shape: TeacherShape, tokens: int) -> Iterator[tuple[str, nn.Module] | str]:
    """Name and model of each peer that can run here; a line for each that cannot."""
    needed, free = batched_mm_bytes(shape, tokens), free_bytes()
    for kind in ("Mixtral", "DeepseekV3"):
        for implementation in EXPERTS_IMPLEMENTATIONS:
            name = f"transformers {kind} {implementation}"
            if implementation == "batched_mm" and needed > free:
                yield (
                    f"peer left out: {name} would copy {needed / 1e9:.0f} GB of weights at this size, "
                    f"{free / 1e9:.0f} GB are free"
                )
                continue
            try:
                yield name, peer_model(kind, implementation, shape)
            except ImportError:
                yield INSTALL
                return


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
    shape: TeacherShape = REFERENCE, sequences: int = SEQUENCES, seconds: float = 25.0, least_rounds: int = 4
) -> Iterator[Row | str]:
    """Per data type: tokens per second against each peer, and the share of the matmul ceiling."""
    generator = torch.Generator().manual_seed(0)
    tokens_BT1 = torch.randint(shape.vocab_size, (sequences, shape.sequence_tokens + 1), generator=generator)
    tokens_BT1 = tokens_BT1.to(DEVICE)
    tokens = sequences * shape.sequence_tokens
    flops = 3 * tokens * flops_per_token(shape, shape.sequence_tokens)["total"]  # backward is twice forward
    yield from extra_work(shape)
    for dtype_name, dtype in DTYPES.items():
        bound, bound_flops = ceiling(dtype)
        actions = {"ours": teacher_step(new_teacher(shape), tokens_BT1, dtype), "ceiling": bound}
        for peer in peer_models(shape, tokens):
            if isinstance(peer, str):
                if dtype_name == "float32":  # told once, not per data type
                    yield peer
            else:
                actions[peer[0]] = peer_step(peer[1], tokens_BT1, dtype)
        peers = list(actions)[2:]
        times = interleaved(actions, seconds, least_rounds, may_fail=peers)
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
