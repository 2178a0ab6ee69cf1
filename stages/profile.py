"""Measures what depends on the clock: latency, training steps, one under activation checkpointing, the router.

    dvc repro profile
    python -m stages.profile profile.repetitions=5       # a quick look, into outputs/profile/

The models take turns, and ratios are taken repetition by repetition, so that other load on the machine affects both.
No two runs give the same bytes of measurements/profile.json, nor of the report that shows it; every other out of the
pipeline is reproducible.
"""

import os
from collections.abc import Callable
from functools import partial

# before torch: by default threads that wait for each other spin, which on a busy machine takes most of the time
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import numpy as np
import torch
import torch.nn.functional as F

from stages.data.shards import Tokens
from stages.files.artifacts import rounded, write_json
from stages.measure import flops as cost
from stages.measure.breakdown import seconds_by_part
from stages.measure.scoring import Estimate
from stages.measure.subjects import PRODUCTS, deepened, device_name, load_models, training_loss
from stages.model import checkpointing
from stages.model.experts import route
from stages.model.families.family import Routing
from stages.model.families.registry import family_of
from stages.model.generation import Reader
from stages.model.kernels.routing import loads, permutation
from stages.model.layers import can_compile
from stages.run.entry import Place, run_stage
from stages.run.heap import keep_freed_memory
from stages.run.provenance import cores, device_conditions

SECTIONS = ("profile", "evaluate", "sequence_tokens", "seed")
COMPRESSED = ("teacher", "student", "sparse_teacher", "sparse_student")  # whose training steps are timed


def main(settings, place: Place, run) -> dict:
    p, e, T = settings.profile, settings.evaluate, settings.sequence_tokens
    torch.set_num_threads(cores())
    conditions = device_conditions(int(torch.cuda.is_available())) | {"threads": cores(), "precision": "float32"}
    keep_freed_memory()  # as a rank does
    split = Tokens(place.read("artifacts/data"), "test")
    loaded = load_models(place.read("artifacts"), split.vocab_size, PRODUCTS)  # a control has the shape of one of them
    tokens = split.window(0, min(len(split), e.checkpoint_batch_sequences * (T + 1) + p.prefill_tokens))
    teacher = loaded["teacher"]
    deep = deepened(teacher, e.checkpoint_layers, settings.seed)
    policies = checkpointing.policies(e.checkpoint_every_blocks, e.checkpoint_layers)
    deep_loss = training_loss(deep, tokens, e.checkpoint_batch_sequences, T)
    losses = {name: training_loss(loaded[name], tokens, e.checkpoint_batch_sequences, T) for name in COMPRESSED}

    print(f"profile: {len(loaded)} models, {p.repetitions} repetitions of each timing", flush=True)
    measurements = {
        "latency": latency(loaded, tokens, p.prefill_tokens, p.decode_tokens, p.repetitions),
        "checkpointing": checkpointing_time(deep, policies, deep_loss, p.repetitions, settings.seed),
        "router": router_time(
            p.router_tokens, teacher.shape, p.router_experts, p.router_experts_per_token, p.repetitions, settings.seed
        ),
        "training": training_time({name: loaded[name] for name in COMPRESSED}, losses, p.repetitions),
        "workload": {"prefill_tokens": p.prefill_tokens, "training_tokens": e.checkpoint_batch_sequences * T},
        "machine": {"threads": torch.get_num_threads(), "torch": torch.__version__, "device": device_name()},
    }
    write_json(place.write("measurements/profile.json"), rounded(measurements))
    return {"conditions": conditions}


@torch.no_grad()
def latency(loaded: dict, tokens: np.ndarray, prefill_tokens: int, decode_tokens: int, repetitions: int) -> dict:
    """One sequence: reading a prompt, then writing with the cache. The models take turns."""
    prompt = np.resize(tokens, prefill_tokens)
    prefills: dict[str, Callable] = {}
    decodes: dict[str, Callable] = {}
    peaks = {}
    for name, model in loaded.items():
        prompt_1T = torch.from_numpy(prompt)[None].to(next(model.parameters()).device)
        reader = Reader(model, 1, prefill_tokens + decode_tokens)
        reader.read(prompt_1T)

        def prefill(model=model, prompt_1T=prompt_1T):
            model.head(model.features(prompt_1T).x_BTD[:, -1])

        def decode(token_11=prompt_1T[:, :1], reader=reader):
            for _ in range(decode_tokens):
                reader.read(token_11)
            reader.forget(decode_tokens)

        prefills[name], decodes[name] = prefill, decode
        live = checkpointing.LiveBytes(model)
        with live, live.record():
            prefill()
        weights = sum(parameter.nbytes for parameter in model.parameters())
        peaks[name] = {"weight_bytes": weights, "prefill_peak_bytes": weights + live.peak}
    prefilled = cost.interleaved_seconds(prefills, repetitions)
    decoded = cost.interleaved_seconds(decodes, repetitions)
    return {
        name: cost.median_and_quartiles("prefill_seconds", prefilled[name])
        | cost.median_and_quartiles("decode_seconds_per_token", decoded[name] / decode_tokens)
        | peaks[name]
        | parts_of(loaded[name], prefills[name], decodes[name], decode_tokens, repetitions)
        for name in loaded
    }


def parts_of(model, prefill: Callable, decode: Callable, decode_tokens: int, repetitions: int) -> dict[str, dict]:
    """What the time of the two goes into; nothing on a GPU, where the host's clock does not see it."""
    if torch.cuda.is_available():
        return {}
    decoded = seconds_by_part(model, decode, repetitions)
    return {
        "prefill_seconds_by_part": seconds_by_part(model, prefill, repetitions),
        "decode_seconds_per_token_by_part": {part: seconds / decode_tokens for part, seconds in decoded.items()},
    }


def checkpointing_time(model, policies: list[str], loss_of, repetitions: int, seed: int) -> dict:
    """Forward and backward under each policy against none; the optimiser, the same for all, is left out."""

    def step(policy):
        with checkpointing.checkpointed(model, policy):
            loss_of().backward()
        model.zero_grad(set_to_none=True)

    seconds = cost.interleaved_seconds({name: partial(step, name) for name in policies}, repetitions)
    rows = {}
    for name in policies:
        ratio, low, high = cost.median_ratio(seconds[name], seconds["none"], seed)
        rows[name] = Estimate(ratio, low, high).named("step_seconds_ratio")
        rows[name] |= cost.median_and_quartiles("step_seconds", seconds[name]) | {"repetitions": len(seconds[name])}
        if torch.cuda.is_available():
            rows[name]["allocator_peak_bytes"] = checkpointing.device_peak_bytes(model, name, loss_of)
    return rows


def training_time(models: dict, losses: dict[str, Callable], repetitions: int) -> dict:
    """Forward and backward of each model on the same batch, without the optimizer. The models take turns."""

    def step(name):
        losses[name]().backward()
        models[name].zero_grad(set_to_none=True)

    seconds = cost.interleaved_seconds({name: partial(step, name) for name in models}, repetitions)
    return {name: cost.median_and_quartiles("step_seconds", seconds[name]) for name in models}


@torch.no_grad()
def router_time(tokens: int, shape, experts: int, per_token: int, repetitions: int, seed: int) -> dict:
    """Our router against the plain one: same tokens and weights, from hidden states to rows by expert.

    The width and the gating are those of `shape`; of a model without experts, the gating is the default.
    """
    gating, route_scale = family_of(shape).routing(shape) or Routing()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    generator = torch.Generator().manual_seed(seed)
    x_ND = torch.randn(tokens, shape.width, generator=generator).to(device)
    router_ED = (torch.randn(experts, shape.width, generator=generator) * shape.width**-0.5).to(device)
    bias_E = torch.zeros(experts, device=device)

    def plain():
        return plain_router(x_ND, router_ED, per_token)

    def ours():
        gates = route(x_ND, router_ED, bias_E, per_token, gating, route_scale)
        return gates.weight_NK, *permutation(gates.expert_index_NK), loads(gates.expert_index_NK, experts)

    if x_ND.is_cuda and can_compile():  # as training compiles it; in one graph, for alone it is nothing but launches
        ours = torch.compile(ours, mode="reduce-overhead")
    seconds = cost.interleaved_seconds({"plain": plain, "ours": ours}, max(repetitions, 5))
    ratio, low, high = cost.median_ratio(seconds["plain"], seconds["ours"], seed)
    return {
        "plain_microseconds": float(np.median(seconds["plain"]) * 1e6),
        "ours_microseconds": float(np.median(seconds["ours"]) * 1e6),
        **Estimate(ratio, low, high).named("ratio"),
        "repetitions": len(seconds["ours"]),
        "tokens": tokens,
        "experts": experts,
        "experts_per_token": per_token,
        "width": shape.width,
    }


def plain_router(x_ND, router_ED, per_token: int):
    """softmax, top-k, and dispatch through a one-hot mask: the rows of one expert after another."""
    score_NE = F.linear(x_ND, router_ED).softmax(dim=-1)
    weight_NK, index_NK = score_NE.topk(per_token, dim=-1)
    weight_NK = weight_NK / weight_NK.sum(dim=-1, keepdim=True)
    mask_EKN = F.one_hot(index_NK, len(router_ED)).permute(2, 1, 0)
    rows = [torch.where(mask_KN) for mask_KN in mask_EKN]
    return weight_NK, rows


if __name__ == "__main__":
    run_stage(main, "profile", SECTIONS)
