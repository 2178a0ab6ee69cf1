"""Trains from nothing, for the same cost, what distillation and pruning have made: the controls of their whole cost.

    dvc repro challenge
    python -m stages.challenge -m challenge.learning_rate_scale=0.5,1,2

    scratch_student          the student's shape, for the cost of teacher and student
    scratch_sparse_teacher   the pruned teacher's shape, for the cost of the teacher and its recovery
    scratch_sparse_student   the pruned student's shape, for the cost of teacher, student and recovery

The cost is the training's floating-point operations by formula, with the teacher's forward passes, calibration and
Muon, so that the steps are the same on every machine. It is read from artifacts/costs, as are the shapes: other weights
of the same cost, as after another temperature, do not train these models again. What a teacher from a folder took
before is not known and not among it: no rival has the whole cost then, and the report gives no verdict of that kind.
"""

from collections.abc import Iterator

from stages.files.artifacts import Refusal, read_json, rounded, write_json
from stages.run.entry import Place, run_stage
from stages.training.launch import launch, write_curves
from stages.training.model_folder import complete_folder

SECTIONS = ("sequence_tokens", "seed", "challenge", "optimizer", "trainer")
COSTS = [f"artifacts/costs/{stage}.json" for stage in ("pretrain", "distill", "sparsify")]
MADE_FROM = {  # the trained models that each model needs, itself not counted
    "control": (),
    "teacher": (),
    "student": ("teacher",),
    "warm_control": ("teacher",),
    "cold_student": ("teacher",),
    "sparse_teacher": ("teacher",),
    "continued_teacher": ("teacher",),
    "sparse_student": ("teacher", "student"),
    "continued_student": ("teacher", "student"),
}
CHALLENGED = ("student", "sparse_teacher", "sparse_student")


def fits(settings, place: Place, _) -> Iterator:
    from stages.training.cost import step_flops

    made = read_costs(place)
    whole = whole_costs(made)
    tokens = settings.challenge.batch_sequences * settings.trainer.accumulate_grad_batches * settings.sequence_tokens
    for name in CHALLENGED:
        fit = from_nothing(name, made, settings, place)
        fit.steps = max(1, whole[name] // step_flops(fit.model, tokens, settings.sequence_tokens))
        yield fit


def from_nothing(name: str, made: dict[str, dict], settings, place: Place):
    """The training of a model's shape from random weights; how many steps it takes is left open."""
    from stages.model.hub import new_model, shape_from
    from stages.training.fit import Fit, NextToken

    recipe, balanced = settings.challenge, made["teacher"]
    return Fit(
        name=f"scratch_{name}",
        model=new_model(shape_from(made[name]["config"], place.read("artifacts/costs")), settings.seed),
        objective=NextToken(balanced["balance_loss_weight"]),
        steps=0,
        batch_sequences=recipe.batch_sequences,
        learning_rate_scale=recipe.learning_rate_scale,
        validate_every_steps=recipe.validate_every_steps,
        validation_sequences=recipe.validation_sequences,
        out=f"artifacts/scratch_{name}",
        bias_update_rate=balanced["bias_update_rate"],
    )


def read_costs(place: Place) -> dict[str, dict]:
    """What each model of the stages before is and took, by name."""
    made: dict[str, dict] = {}
    for path in COSTS:
        made |= read_json(place.read(path))
    if missing := sorted(MADE_FROM.keys() - made.keys()):
        raise Refusal(f"artifacts/costs tells nothing of {missing[0]}: run dvc repro")
    return made


def whole_costs(made: dict[str, dict]) -> dict[str, int]:
    """Training operations of each model together with those of the models that it was made from."""
    return {
        name: sum(made[part]["training_flops"] for part in (name, *parents)) for name, parents in MADE_FROM.items()
    }


def main(settings, place: Place, run) -> dict:
    result, conditions = launch(fits, settings, place, ["artifacts/data", *COSTS], run)
    write_curves(place, "challenge", result)
    made = read_costs(place) | {name: fit["made"] for name, fit in result.items()}
    own = {name: model["training_flops"] for name, model in made.items()}
    metrics = {
        **{f"{name}_validation_bits_per_byte": fit["validation_bits_per_byte"] for name, fit in result.items()},
        **{f"{name}_steps": fit["curve"][-1]["step"] for name, fit in result.items()},
        "training_flops": own,
        "whole_training_flops": own | whole_costs(made),
    }
    if unknown := made["teacher"].get("unknown_before", False):
        metrics["teacher_cost_known"] = False
    write_json(place.write("metrics/challenge.json"), rounded(metrics))
    run.metrics({name: value for name, value in metrics.items() if name.startswith("scratch")})
    for name in result:
        cost = "here, its teacher's own training not counted" if unknown else "as a whole"
        summary = f"The shape of `{name.removeprefix('scratch_')}`, trained from nothing for what that cost {cost}."
        figures = {key: metrics[f"{name}_{key}"] for key in ("validation_bits_per_byte", "steps")}
        complete_folder(place, name, summary, (), figures, settings.sequence_tokens)
    return {"conditions": conditions}


if __name__ == "__main__":
    run_stage(main, "challenge", SECTIONS)
