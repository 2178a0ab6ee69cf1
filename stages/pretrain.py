"""Trains the mixture-of-experts teacher with Lightning DDP, or takes one that is there from a Hugging Face folder.

dvc repro pretrain                                              # the experiment of record
python -m stages.pretrain pretrain.steps=50                     # by hand, into outputs/
python -m stages.pretrain -m optimizer.muon_learning_rate=0.01,0.02
python -m stages.pretrain teacher=folder teacher.path=models/mine      # docs/own_models.md

A folder is checked, measured on the validation split and written as every model of this project; with pretrain.steps
above 0 it is trained on. What it took to train before is not known, and the later stages say so.
"""

import os
from collections.abc import Iterator

from stages.data.fingerprints import teacher_fingerprint
from stages.data.shards import read_card
from stages.data.teacher_folder import refuse_longer, teacher_folder
from stages.files.artifacts import Refusal, read_json, rounded, write_json
from stages.run.entry import Place, run_stage
from stages.training.launch import launch, write_costs, write_curves
from stages.training.model_folder import complete_folder

SECTIONS = ("sequence_tokens", "seed", "teacher", "pretrain", "optimizer", "trainer")


def fits(settings, place: Place, _) -> Iterator:
    """What every rank trains."""
    from stages.model.hub import build_teacher
    from stages.training.fit import Fit, NextToken

    shape, recipe = settings.teacher, settings.pretrain
    vocab_size, is_there = read_card(place.read("artifacts/data"))["vocab_size"], shape.source == "folder"
    yield Fit(
        name="teacher",
        model=read_teacher(settings, place, vocab_size)
        if is_there
        else build_teacher(shape, vocab_size, settings.sequence_tokens, settings.seed),
        objective=NextToken(shape.balance_loss_weight),
        steps=recipe.steps,
        batch_sequences=recipe.batch_sequences,
        learning_rate_scale=recipe.learning_rate_scale,
        validate_every_steps=recipe.validate_every_steps,
        validation_sequences=recipe.validation_sequences,
        out="artifacts/teacher",
        bias_update_rate=shape.bias_update_rate,
        unknown_before=is_there,
    )


def read_teacher(settings, place: Place, vocab_size: int):
    """The model of the folder; rank zero says first what it takes. One that does not fit is refused."""
    from stages.files.weight_files import refuse_larger_than_memory, weight_files
    from stages.model.hub import load
    from stages.training.cost import expectation

    folder = teacher_folder(settings.teacher.path, place.root)
    refuse_longer(settings.sequence_tokens, folder)
    ranks = int(os.environ.get("LOCAL_WORLD_SIZE", os.environ["WORLD_SIZE"]))
    files = weight_files(folder)
    refuse_larger_than_memory(files, folder, ranks, is_saved=True)
    expected = expectation(folder, files, settings.sequence_tokens)  # in all ranks at once, as training computes
    if os.environ["RANK"] == "0":
        print(f"teacher: {settings.teacher.path}: {expected}", flush=True)
    model = load(folder)
    if model.shape.vocab_size != vocab_size:
        raise Refusal(
            f"{folder}: vocab_size is {model.shape.vocab_size}, artifacts/data has {vocab_size}: run dvc repro prepare"
        )
    return model


def sources_of(settings, place: Place) -> dict[str, str]:
    """Where the teacher comes from, by checksum: nowhere, or a folder, which must be the one that `prepare` saw."""
    files = teacher_fingerprint(settings.teacher, place.root)
    if files is None:
        return {}
    if read_card(place.read("artifacts/data")).get("teacher") != files:
        path = settings.teacher.path
        raise Refusal(f"artifacts/data was not made with {path} as it is now: run dvc repro prepare")
    return {"folder that the teacher was read from": files["sha256"]}


def main(settings, place: Place, run) -> dict:
    sources = sources_of(settings, place)
    result, conditions = launch(fits, settings, place, ["artifacts/data"], run)
    write_curves(place, "pretrain", result)
    write_costs(place, "pretrain", result)
    teacher = result["teacher"]
    metrics = {k: teacher[k] for k in ("validation_bits_per_byte", "expert_load", "max_violation")}
    batches = settings.pretrain.steps * settings.trainer.accumulate_grad_batches
    metrics["tokens"] = batches * settings.pretrain.batch_sequences * settings.sequence_tokens
    if sources:
        metrics["source"] = "folder"
    write_json(place.write("metrics/pretrain.json"), rounded(metrics))
    run.metrics({"validation_bits_per_byte": teacher["validation_bits_per_byte"]})
    figures = {key: metrics[key] for key in ("validation_bits_per_byte", "tokens")}
    complete_folder(place, "teacher", summary(settings, place), (), figures, settings.sequence_tokens, sources)
    run.model(place.write("artifacts/teacher"))
    return {"conditions": conditions}


def summary(settings, place: Place) -> str:
    """How the teacher came to be, in a sentence of its model card."""
    if settings.teacher.source == "train":
        return "The teacher: a mixture of experts with latent attention, trained from random weights."
    kind = read_json(place.write("artifacts/teacher") / "config.json")["model_type"]
    then = f"and trained on for {settings.pretrain.steps} steps" if settings.pretrain.steps else "and not trained here"
    licence = "What its own licence asks for holds for this copy and for every model made from it."
    return f"The teacher: a {kind}, read from a folder of its user's {then}. {licence}"


if __name__ == "__main__":
    run_stage(main, "pretrain", SECTIONS)
