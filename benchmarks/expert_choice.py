"""A pruned mixture with a fixed number of experts per token against one that follows the router's confidence.

    python -m benchmarks.expert_choice FOLDER      # of a checkout whose pretrain has run, at any scale

Both prune the checkout's teacher alike and recover as `sparsify` does, from the same batches, in one process without
Lightning; at equal mean counts they have equal operations. Quality is on all test documents, with intervals by the
paired bootstrap. The load's violation is of the recovery's last steps: the busiest expert over its fair share.
"""

import sys
from pathlib import Path

import torch

from stages.compress.pruning import prune
from stages.compress.scores import importance
from stages.data.shards import Tokens, Windows, load_tokenizer
from stages.measure import scoring
from stages.measure.flops import flops_per_token
from stages.model import hub
from stages.model.families.deepseek_v3.confidence import settle
from stages.model.layers import has_bfloat16
from stages.settings.compose import compose
from stages.settings.schema import validate
from stages.training.callbacks import LOAD_WINDOW_STEPS
from stages.training.fit import Distillation, max_violation
from stages.training.optimizers import learning_rate_factor, make_optimizer

# name: mean number of experts per token, by confidence?, rate of the biases' updates while it recovers
VARIANTS = {
    "fixed 3, biases still": (3, False, 0.0),
    "fixed 3": (3, False, 0.001),
    "confidence, mean 3": (3, True, 0.001),
    "fixed 2": (2, False, 0.001),
    "confidence, mean 2": (2, True, 0.001),
}


def recovered(model, dense, settings, windows, rate: float) -> float:
    """Trains as sparsify's recovery does; returns the worst violation of the layers' loads."""
    recipe = settings.sparsify.recovery
    objective = Distillation(dense, recipe.divergence, recipe.temperature, recipe.soft_weight, recipe.chunk_tokens)
    optimizer = make_optimizer(model, settings.optimizer, recipe.learning_rate_scale)
    rates = [group["lr"] for group in optimizer.param_groups]
    warmup, decay = settings.optimizer.warmup_share, settings.optimizer.decay_share
    recent: list[torch.Tensor] = []
    model.train()
    for step in range(recipe.steps):
        for group, full in zip(optimizer.param_groups, rates, strict=True):
            group["lr"] = full * learning_rate_factor(step, recipe.steps, warmup, decay)
        tokens_BT1 = windows.batch(step, 0, 1, recipe.batch_sequences)
        with torch.autocast("cpu", torch.bfloat16, enabled=has_bfloat16("cpu")):
            outcome = objective(model, tokens_BT1)
            outcome.loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), settings.optimizer.clip_norm)
            optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        model.balance(outcome.loads, rate)
        recent = [*recent, torch.stack(outcome.loads)][-LOAD_WINDOW_STEPS:]
    model.eval()
    return max(max_violation(load_E) for load_E in torch.stack(recent).sum(0))


def main() -> None:
    artifacts = Path(sys.argv[1]) / "artifacts"
    settings = validate(compose(sys.argv[2:]))
    data, T = artifacts / "data", settings.sequence_tokens
    dense = hub.load(artifacts / "teacher")
    windows = Windows(Tokens(data, "train"), T, settings.seed + 1)
    calibration = [windows.batch(number, 0, 1, 8) for number in range(settings.sparsify.calibration_sequences // 8)]
    scores = importance(dense, calibration, vars(settings.sparsify.score))
    stream = scoring.read_stream(Tokens(data, "test"), load_tokenizer(data), settings.evaluate.test_tokens)
    recovery_windows = Windows(Tokens(data, "train"), T, settings.seed)
    sparsify = settings.sparsify.teacher
    shares = {"heads": sparsify.keep_heads, "neurons": sparsify.keep_neurons, "experts": sparsify.keep_experts}

    one_shot, after, violations, shapes = {}, {}, {}, {}
    for name, (mean, by_confidence, rate) in VARIANTS.items():
        count = 1.0 if by_confidence else mean / dense.shape.experts_per_token
        model = prune(dense, shares | {"experts_per_token": count}, scores).eval()
        if by_confidence:
            settle(model, mean, calibration)
        one_shot[name] = scoring.score({"own": model}, stream, T, 16, "own")["own"]
        violations[name] = recovered(model, dense, settings, recovery_windows, rate)
        if by_confidence:
            settle(model, mean, calibration)
        after[name] = scoring.score({"own": model}, stream, T, 16, "own")["own"]
        shapes[name] = model.shape
        print(f"{name}: {scoring.bits_per_byte(after[name]):.4f} bits per byte", file=sys.stderr, flush=True)

    table = scoring.score({"own": dense}, stream, T, 16, "own")["own"]
    bootstrap = scoring.Bootstrap(len(table), settings.evaluate.bootstrap_resamples, settings.seed)
    whole = flops_per_token(dense.shape, T)["total"]
    print("| experts per token | mean count | forward FLOPs | lost at once | lost after recovery | 95% | violation |")
    print("| --- | --- | --- | --- | --- | --- | --- |")
    for name, shape in shapes.items():
        at_once = scoring.quality_lost(bootstrap, table, one_shot[name])
        lost = scoring.quality_lost(bootstrap, table, after[name])
        cut = 1 - flops_per_token(shape, T)["total"] / whole
        print(
            f"| {name} | {shape.experts_at_work:.3f} | −{cut:.1%} | {at_once.value:+.2%} | {lost.value:+.2%} "
            f"| {lost.low:+.2%} to {lost.high:+.2%} | {violations[name]:.2f} |"
        )
    for mean in (3, 2):
        gain = scoring.quality_lost(bootstrap, after[f"fixed {mean}"], after[f"confidence, mean {mean}"])
        interval = f"{gain.low:+.2%} to {gain.high:+.2%}"
        print(f"confidence over fixed, mean {mean}: {gain.value:+.2%} bits per byte ({interval})")


if __name__ == "__main__":
    main()
