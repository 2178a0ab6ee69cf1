"""Makes teacher and student physically smaller, then recovers them by distillation from the unpruned model.

    dvc repro sparsify
    python -m stages.sparsify -m sparsify.teacher.keep_neurons=0.4,0.6,0.8

A teacher without experts is pruned in heads and neurons; keep_experts and keep_experts_per_token do nothing then.
Nothing is merely zeroed: heads, neurons and experts leave the tensors. Beside each sparse model stands its control,
the dense model trained on for the same extra tokens, since recovery alone also improves a model.
"""

from collections.abc import Callable, Iterator
from functools import partial

from stages.files.artifacts import Refusal, rounded, write_json
from stages.run.entry import Place, run_stage
from stages.training.launch import launch, write_costs, write_curves
from stages.training.model_folder import complete_folder

SECTIONS = ("sequence_tokens", "seed", "sparsify", "optimizer", "trainer")
INPUTS = ["artifacts/data", "artifacts/teacher", "artifacts/student"]
CALIBRATION_SEQUENCES = 8  # of a batch
# At most: forward and backward once for heads, forward once for neurons and once for experts.
CALIBRATION_PASSES = 5
SUMMARIES = {
    "sparse": "The {dense}, pruned (whole structures left its tensors) and recovered by distillation from it.",
    "continued": "The control of the pruned {dense}: the {dense} itself, trained on for the same extra tokens.",
}


def fits(settings, place: Place, keep: Callable) -> Iterator:
    from stages.compress.pruning import prune
    from stages.data.shards import Tokens, Windows
    from stages.model import hub as models
    from stages.model.families.registry import family_of
    from stages.training.cost import forward_flops
    from stages.training.fit import Distillation, Fit, NextToken

    recipe, data = settings.sparsify.recovery, place.read("artifacts/data")
    multiple = settings.sparsify.neuron_multiple
    windows = Windows(Tokens(data, "train"), settings.sequence_tokens, settings.seed + 1)
    batches = settings.sparsify.calibration_sequences // CALIBRATION_SEQUENCES
    *calibration, held_out = (windows.batch(i, 0, 1, CALIBRATION_SEQUENCES) for i in range(batches + 1))
    calibration_tokens = batches * CALIBRATION_SEQUENCES * settings.sequence_tokens
    common = {
        "steps": recipe.steps,
        "batch_sequences": recipe.batch_sequences,
        "learning_rate_scale": recipe.learning_rate_scale,
        "validate_every_steps": recipe.validate_every_steps,
        "validation_sequences": recipe.validation_sequences,
    }
    for name in ("teacher", "student"):
        dense = models.load(place.read(f"artifacts/{name}"))
        wanted = vars(getattr(settings.sparsify, name))
        shares = {key.removeprefix("keep_"): share for key, share in wanted.items() if key.startswith("keep_")}
        choice = wanted.get("expert_choice")
        if family_of(dense.shape).routing(dense.shape) is None:  # what is said of experts finds none
            shares, choice = {key: share for key, share in shares.items() if not key.startswith("experts")}, None
        settle = mean_count(dense.shape, shares, choice, calibration)
        words = vars(settings.sparsify.score)
        look = partial(calibrate, dense, shares, multiple, words, calibration, [held_out], settle)
        kept = keep(f"{name}_calibration", look)
        sparse = prune(dense, shares, kept["importance"], multiple)
        settle(sparse)
        balance = wanted.get("bias_update_rate", 0.0)  # of both: a control is beaten only where it was treated alike
        yield Fit(
            name=f"sparse_{name}",
            model=sparse,
            objective=Distillation(
                dense, recipe.divergence, recipe.temperature, recipe.soft_weight, recipe.chunk_tokens
            ),
            out=f"artifacts/sparse_{name}",
            notes={"one_shot_loss_ratio": kept["one_shot_loss_ratio"]},
            bias_update_rate=balance,
            finish=settle,
            prepared_flops=CALIBRATION_PASSES
            * round(forward_flops(dense.shape, calibration_tokens, settings.sequence_tokens)),
            **common,
        )
        yield Fit(
            name=f"continued_{name}",
            model=models.load(place.read(f"artifacts/{name}")),
            objective=NextToken(),
            out=f"artifacts/continued_{name}",
            bias_update_rate=balance,
            **common,
        )


def mean_count(shape, shares: dict[str, float], expert_choice: str | None, calibration: list) -> Callable:
    """What sets the number of experts per token of a pruned model by confidence; nothing where the number is fixed.

    Then each token may take as many as before, and the mean is the number that would else be fixed: `shares` changes.
    """
    from stages.compress.pruning import pruned_shape
    from stages.model.families.deepseek_v3.confidence import settle

    if expert_choice != "confidence":
        return lambda model: None
    if getattr(shape, "gate_mass", None) is None:
        raise Refusal(
            "sparsify.teacher.expert_choice = confidence: only the router of our own classes counts experts by token:"
            " set it to fixed"
        )
    mean = pruned_shape(shape, shares).experts_per_token
    shares["experts_per_token"] = 1.0
    return lambda model: settle(model, mean, calibration)


def calibrate(
    dense,
    shares: dict[str, float],
    multiple: int,
    words: dict[str, str],
    calibration: list,
    held_out: list,
    settle: Callable,
) -> dict:
    """What decides which structures go, and how much worse the model is right after they went."""
    from stages.compress.pruning import prune
    from stages.compress.scores import importance
    from stages.training.fit import validation_nats

    scores = importance(dense, calibration, words)
    sparse = prune(dense, shares, scores, multiple)
    settle(sparse)
    before, after = (validation_nats(model, held_out).item() for model in (dense, sparse))
    return {"importance": scores, "one_shot_loss_ratio": after / before}


def extra_tokens(settings) -> int:
    recovery = settings.sparsify.recovery
    sequences = recovery.steps * settings.trainer.accumulate_grad_batches * recovery.batch_sequences
    return sequences * settings.sequence_tokens


def main(settings, place: Place, run) -> dict:
    result, conditions = launch(fits, settings, place, INPUTS, run)
    write_curves(place, "sparsify", result)
    write_costs(place, "sparsify", result)
    metrics = {f"{name}_validation_bits_per_byte": fit["validation_bits_per_byte"] for name, fit in result.items()}
    for name in ("sparse_teacher", "sparse_student"):
        metrics[f"{name}_one_shot_loss_ratio"] = result[name]["notes"]["one_shot_loss_ratio"]
    violations = result["sparse_teacher"]["max_violation"]
    metrics |= {f"sparse_teacher_max_violation_{layer}": value for layer, value in enumerate(violations)}
    write_json(place.write("metrics/sparsify.json"), rounded(metrics))
    run.metrics(metrics)
    for name, fit in result.items():
        how, dense = name.split("_")
        figures = {"validation_bits_per_byte": fit["validation_bits_per_byte"], "extra_tokens": extra_tokens(settings)}
        summary = SUMMARIES[how].format(dense=dense)
        complete_folder(place, name, summary, (dense,), figures, settings.sequence_tokens)
    for name in ("sparse_teacher", "sparse_student"):
        run.model(place.write(f"artifacts/{name}"))
    return {"conditions": conditions}


if __name__ == "__main__":
    run_stage(main, "sparsify", SECTIONS)
