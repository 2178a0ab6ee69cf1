"""Distils the teacher into the small dense student, and trains its controls: what else the same tokens give.

    dvc repro distill
    python -m stages.distill -m distill.temperature=1,2,4           # a sweep over the teacher of record

                            targets: the data alone     targets: the teacher's
    start: random           control                     cold_student
    start: the teacher      warm_control                student, unless distill.init is random

All see the same tokens in the same order. Where distill.init is teacher, the student's start is a mixture's weights,
translated; where it is pruned, what is left of a dense teacher that is cut to a budget of parameters; where it is
random, the student is the cold one. Hinton et al. 2015: soft targets at temperature T, scaled by T², mixed with
cross-entropy on the data.
"""

from collections.abc import Callable, Iterator

from stages.files.artifacts import Refusal, read_json, rounded, write_atomically, write_json
from stages.run.entry import Place, run_stage
from stages.training.launch import launch, write_costs, write_curves
from stages.training.model_folder import complete_folder

SECTIONS = ("sequence_tokens", "seed", "student", "distill", "optimizer", "trainer")
INPUTS = ["artifacts/data", "artifacts/teacher"]
CONTROLS = ("control", "warm_control", "cold_student")
# Forward passes of the teacher that a start takes, a backward one for two: for its norms' inputs and its heads; or for
# its layers, heads and neurons.
START_PASSES = {"teacher": 4, "random": 4, "pruned": 5}


def fits(settings, place: Place, keep: Callable) -> Iterator:
    from stages.data.shards import Tokens, Windows
    from stages.model.hub import build_student, load, new_model, shape_from
    from stages.training.cost import forward_flops
    from stages.training.fit import Distillation, Fit, NextToken

    recipe, data, T = settings.distill, place.read("artifacts/data"), settings.sequence_tokens
    teacher, vocab_size = load(place.read("artifacts/teacher")), vocabulary(place)
    common = {
        "steps": recipe.steps,
        "batch_sequences": recipe.batch_sequences,
        "learning_rate_scale": recipe.learning_rate_scale,
        "validate_every_steps": recipe.validate_every_steps,
        "validation_sequences": recipe.validation_sequences,
    }
    windows = Windows(Tokens(data, "train"), T, settings.seed)
    calibration = [windows.batch(0, 0, 1, recipe.batch_sequences)]
    if recipe.init == "pruned":
        warm = keep("pruned", lambda: cut_out(teacher, settings.student, calibration))
        shape = shape_from(warm["config"], place.read("artifacts/teacher"))

    def build():
        if recipe.init == "pruned":
            return new_model(shape, settings.seed)
        return build_student(settings.student, vocab_size, T, settings.seed)

    if recipe.init != "pruned":
        warm = warm_start(build, teacher, calibration, keep, needed=recipe.init == "teacher")
    warm_flops = START_PASSES[recipe.init] * round(forward_flops(teacher.shape, recipe.batch_sequences * T, T))

    def cell(name: str, from_teacher: bool, soft_targets: bool) -> Fit:
        model = build()
        if from_teacher:
            model.load_state_dict(warm["weights"])
        soft = recipe.divergence, recipe.temperature, recipe.soft_weight, recipe.chunk_tokens
        return Fit(
            name=name,
            model=model,
            objective=Distillation(teacher, *soft) if soft_targets else NextToken(),
            out=f"artifacts/{name}",
            notes={"copied": warm["copied"]} if from_teacher else {},
            prepared_flops=warm_flops if from_teacher else 0,
            **common,
        )

    yield cell("student", from_teacher=recipe.init != "random", soft_targets=True)
    yield cell("control", from_teacher=False, soft_targets=False)
    if warm:
        yield cell("warm_control", from_teacher=True, soft_targets=False)
    if recipe.init != "random":
        yield cell("cold_student", from_teacher=False, soft_targets=True)


def vocabulary(place: Place) -> int:
    """The size of the vocabulary; a teacher of another tokenizer than the data's is refused."""
    from stages.data.shards import read_card

    card = read_card(place.read("artifacts/data"))
    if read_json(place.read("artifacts/teacher") / "config.json")["tokenizer_sha256"] != card["tokenizer_sha256"]:
        raise Refusal(
            "artifacts/teacher was trained with another tokenizer than artifacts/data/tokenizer.json:"
            " a student learns only from a teacher of its own tokenizer; run dvc repro pretrain"
        )
    return card["vocab_size"]


def warm_start(build: Callable, teacher, calibration: list, keep: Callable, needed: bool) -> dict:
    """A student's weights from the teacher and what was copied; empty where it fits no student and is not needed."""
    from stages.compress.warm_start import initialise_student

    def make():
        student = build()
        copied = initialise_student(student, teacher, calibration)
        return {"copied": copied, "weights": student.state_dict()}

    try:
        return keep("warm_start", make)
    except Refusal:
        if needed:
            raise
        return {}


def cut_out(teacher, student, calibration: list) -> dict:
    """The weights of the student that is cut out of the teacher, its architecture, and what was kept of each structure.

    `student` is the section of that name.
    """
    from stages.compress.cut import cut_student
    from stages.model.families.registry import family_of

    model, kept = cut_student(teacher, student.parameters_share, student.keep_layers, student.keep_heads, calibration)
    return {"copied": kept, "weights": model.state_dict(), "config": family_of(model.shape).config_of(model.shape)}


def summaries(recipe) -> dict[str, str]:
    """How each cell was made, in a sentence of its model card."""
    targets = f"{recipe.divergence}, T = {recipe.temperature:g}, weight {recipe.soft_weight:g}"
    soft = f"distilled from the teacher ({targets})"
    start = {
        "teacher": "the teacher's weights",
        "pruned": "the teacher's most important layers, heads and neurons",
        "random": "random weights",
    }
    own = start["teacher" if recipe.init == "random" else recipe.init]
    return {
        "student": f"The dense student, started from {start[recipe.init]} and {soft}.",
        "cold_student": f"A control of the student: the same shape and tokens, started from random weights and {soft}.",
        "warm_control": f"A control of the student: the same shape and tokens, started from {own} and trained on"
        " the data alone.",
        "control": "The student's control: the same shape and tokens, from random weights and the data alone.",
    }


def main(settings, place: Place, run) -> dict:
    result, conditions = launch(fits, settings, place, INPUTS, run)
    # A cell that is the same training as another is trained once and kept under both names.
    twins = {"cold_student": "student", "warm_control": "control"}
    twins = {twin: name for twin, name in twins.items() if twin not in result}
    for twin, name in twins.items():
        result[twin] = result[name]
        for file in sorted(place.write(f"artifacts/{name}").iterdir()):
            write_atomically(place.write(f"artifacts/{twin}/{file.name}"), file.read_bytes())
    write_curves(place, "distill", result)
    write_costs(place, "distill", result)
    batches = settings.distill.steps * settings.trainer.accumulate_grad_batches
    metrics = {
        "validation_bits_per_byte": result["student"]["validation_bits_per_byte"],
        **{f"{name}_validation_bits_per_byte": result[name]["validation_bits_per_byte"] for name in CONTROLS},
        "temperature": settings.distill.temperature,
        "init": settings.distill.init,
        "tokens": batches * settings.distill.batch_sequences * settings.sequence_tokens,
        "copied_from_teacher": result["student"]["notes"].get("copied", {}),
    }
    write_json(place.write("metrics/distill.json"), rounded(metrics))
    run.metrics({k: v for k, v in metrics.items() if k.endswith("bits_per_byte")})
    how = summaries(settings.distill)
    for name in how:
        trained_as = twins.get(name, name)
        parents = () if trained_as == "control" else ("teacher",)
        summary = how[trained_as] + f" It was trained once, as `{trained_as}`." * (name in twins)
        figures = {"validation_bits_per_byte": result[name]["validation_bits_per_byte"], "tokens": metrics["tokens"]}
        complete_folder(place, name, summary, parents, figures, settings.sequence_tokens)
    run.model(place.write("artifacts/student"))
    return {"conditions": conditions}


if __name__ == "__main__":
    run_stage(main, "distill", SECTIONS)
