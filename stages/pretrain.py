"""Trains the mixture-of-experts teacher with Lightning DDP.

dvc repro pretrain                                              # the experiment of record
python -m stages.pretrain pretrain.steps=50                     # by hand, into outputs/
python -m stages.pretrain -m optimizer.muon_learning_rate=0.01,0.02
"""

from collections.abc import Iterator

from stages.files.artifacts import rounded, write_json
from stages.run.entry import Place, run_stage
from stages.training.launch import launch, write_costs, write_curves
from stages.training.model_folder import complete_folder

SECTIONS = ("sequence_tokens", "seed", "teacher", "pretrain", "optimizer", "trainer")


def fits(settings, place: Place, _) -> Iterator:
    """What every rank trains."""
    from stages.data.shards import read_card
    from stages.model.hub import build_teacher
    from stages.training.fit import Fit, NextToken

    shape, recipe = settings.teacher, settings.pretrain
    vocab_size = read_card(place.read("artifacts/data"))["vocab_size"]
    yield Fit(
        name="teacher",
        model=build_teacher(shape, vocab_size, settings.sequence_tokens, settings.seed),
        objective=NextToken(shape.balance_loss_weight),
        steps=recipe.steps,
        batch_sequences=recipe.batch_sequences,
        learning_rate_scale=recipe.learning_rate_scale,
        validate_every_steps=recipe.validate_every_steps,
        validation_sequences=recipe.validation_sequences,
        out="artifacts/teacher",
        bias_update_rate=shape.bias_update_rate,
    )


def main(settings, place: Place, run) -> dict:
    result, conditions = launch(fits, settings, place, ["artifacts/data"], run)
    write_curves(place, "pretrain", result)
    write_costs(place, "pretrain", result)
    teacher = result["teacher"]
    metrics = {k: teacher[k] for k in ("validation_bits_per_byte", "expert_load", "max_violation")}
    batches = settings.pretrain.steps * settings.trainer.accumulate_grad_batches
    metrics["tokens"] = batches * settings.pretrain.batch_sequences * settings.sequence_tokens
    write_json(place.write("metrics/pretrain.json"), rounded(metrics))
    run.metrics({"validation_bits_per_byte": teacher["validation_bits_per_byte"]})
    figures = {key: metrics[key] for key in ("validation_bits_per_byte", "tokens")}
    summary = "The teacher: a mixture of experts with latent attention, trained from random weights."
    complete_folder(place, "teacher", summary, (), figures, settings.sequence_tokens)
    run.model(place.write("artifacts/teacher"))
    return {"conditions": conditions}


if __name__ == "__main__":
    run_stage(main, "pretrain", SECTIONS)
