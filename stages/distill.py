"""Distils the teacher into the small dense student, and trains its control: the same student without a teacher.

    dvc repro distill
    python -m stages.distill -m distill.temperature=1,2,4           # a sweep over the teacher of record

Student and control see the same tokens in the same order. Hinton et al. 2015: soft targets at temperature T,
scaled by T², mixed with cross-entropy on the data.
"""

from collections.abc import Callable, Iterator

from stages.files.artifacts import Refusal, read_json, rounded, write_json
from stages.run.entry import Place, run_stage
from stages.training.launch import launch, write_curves

SECTIONS = ("sequence_tokens", "seed", "student", "distill", "optimizer", "trainer")
INPUTS = ["artifacts/data", "artifacts/teacher"]


def fits(settings, place: Place, keep: Callable) -> Iterator:
    from stages.compress.warm_start import initialise_student
    from stages.data.shards import Tokens, Windows, read_card
    from stages.model.hub import build_student, load
    from stages.training.fit import Distillation, Fit, NextToken

    recipe, data = settings.distill, place.read("artifacts/data")
    teacher, card = load(place.read("artifacts/teacher")), read_card(data)
    teacher_tokenizer_sha256 = read_json(place.read("artifacts/teacher") / "config.json")["tokenizer_sha256"]
    if teacher_tokenizer_sha256 != card["tokenizer_sha256"]:
        raise Refusal(
            "artifacts/teacher was trained with another tokenizer than artifacts/data/tokenizer.json:"
            " a student learns only from a teacher of its own tokenizer; run dvc repro pretrain"
        )
    vocab_size = card["vocab_size"]
    common = {
        "steps": recipe.steps,
        "batch_sequences": recipe.batch_sequences,
        "learning_rate_scale": recipe.learning_rate_scale,
        "validate_every_steps": recipe.validate_every_steps,
        "validation_sequences": recipe.validation_sequences,
    }
    student = build_student(settings.student, vocab_size, settings.sequence_tokens, settings.seed)
    copied = {}
    if recipe.init == "teacher":

        def warm_start():
            windows = Windows(Tokens(data, "train"), settings.sequence_tokens, settings.seed)
            copied = initialise_student(student, teacher, [windows.batch(0, 0, 1, recipe.batch_sequences)])
            return {"copied": copied, "weights": student.state_dict()}

        kept = keep("warm_start", warm_start)
        student.load_state_dict(kept["weights"])
        copied = kept["copied"]
    yield Fit(
        name="student",
        model=student,
        objective=Distillation(
            teacher, recipe.divergence, recipe.temperature, recipe.soft_weight, recipe.chunk_tokens
        ),
        out="artifacts/student",
        notes={"copied": copied},
        **common,
    )
    control = build_student(settings.student, vocab_size, settings.sequence_tokens, settings.seed)
    yield Fit(name="control", model=control, objective=NextToken(), out="artifacts/control", **common)


def main(settings, place: Place, run) -> dict:
    result, conditions = launch(fits, settings, place, INPUTS, run)
    write_curves(place, "distill", result)
    batches = settings.distill.steps * settings.trainer.accumulate_grad_batches
    metrics = {
        "validation_bits_per_byte": result["student"]["validation_bits_per_byte"],
        "control_validation_bits_per_byte": result["control"]["validation_bits_per_byte"],
        "temperature": settings.distill.temperature,
        "tokens": batches * settings.distill.batch_sequences * settings.sequence_tokens,
        "copied_from_teacher": result["student"]["notes"]["copied"],
    }
    write_json(place.write("metrics/distill.json"), rounded(metrics))
    run.metrics({k: v for k, v in metrics.items() if k.endswith("bits_per_byte")})
    run.model(place.write("artifacts/student"))
    return {"conditions": conditions}


if __name__ == "__main__":
    run_stage(main, "distill", SECTIONS)
