"""Trains the mixture-of-experts teacher with Lightning DDP, or takes one that is there from a Hugging Face folder.

dvc repro pretrain                                              # the experiment of record
python -m stages.pretrain pretrain.steps=50                     # by hand, into outputs/
python -m stages.pretrain -m optimizer.muon_learning_rate=0.01,0.02
python -m stages.pretrain teacher=folder teacher.path=models/mine      # docs/own_models.md

A folder is checked, measured on the validation split and written as every model of this project; with pretrain.steps
above 0 it is trained on. What it took to train before is not known, and the later stages say so.
"""

import math
import os
from collections.abc import Iterator
from pathlib import Path

from stages.data.fingerprints import teacher_fingerprint
from stages.data.shards import read_card
from stages.data.teacher_folder import refuse_longer, teacher_folder
from stages.data.vocabulary import read_kept
from stages.files.artifacts import Refusal, read_json, rounded, write_json
from stages.run.entry import Place, run_stage
from stages.training.launch import launch, write_costs, write_curves
from stages.training.model_folder import complete_folder

GAIN = "bits_per_byte_gained_by_trimming"
SECTIONS = ("sequence_tokens", "seed", "teacher", "pretrain", "optimizer", "trainer")


def fits(settings, place: Place, _) -> Iterator:
    """What every rank trains."""
    from stages.model.hub import build_teacher
    from stages.training.fit import Fit, NextToken

    shape, recipe = settings.teacher, settings.pretrain
    is_there, notes = shape.source == "folder", {}
    if is_there:
        model, notes = read_teacher(settings, place)
    else:
        vocab_size = read_card(place.read("artifacts/data"))["vocab_size"]
        model = build_teacher(shape, vocab_size, settings.sequence_tokens, settings.seed)
    yield Fit(
        name="teacher",
        model=model,
        objective=NextToken(shape.balance_loss_weight),
        steps=recipe.steps,
        batch_sequences=recipe.batch_sequences,
        learning_rate_scale=recipe.learning_rate_scale,
        validate_every_steps=recipe.validate_every_steps,
        validation_sequences=recipe.validation_sequences,
        out="artifacts/teacher",
        bias_update_rate=shape.bias_update_rate,
        notes=notes,
        unknown_before=is_there,
    )


def read_teacher(settings, place: Place) -> tuple:
    """The model of the folder, and what a trimmed vocabulary gains it; rank zero says first what it takes.

    One that does not fit is refused.
    """
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
    model, data = load(folder), place.read("artifacts/data")
    trimmed = read_kept(data)
    kept, vocab_size = trimmed or (None, read_card(data)["vocab_size"])
    if model.shape.vocab_size != vocab_size:
        raise Refusal(
            f"{folder}: vocab_size is {model.shape.vocab_size}, artifacts/data has {vocab_size}: run dvc repro prepare"
        )
    return (model, {}) if kept is None else with_kept_rows(model, kept, settings, data)


def with_kept_rows(model, kept: list[int], settings, data: Path) -> tuple:
    """The model without the rows of dropped ids; rank zero measures on the validation split what that gains.

    The kept tokens share the probability that the dropped ones had: nothing else changes in the model's loss.
    """
    import torch

    from stages.data.shards import Tokens, Windows
    from stages.model.vocabulary import dropped_nats, with_rows

    if os.environ["RANK"] != "0":
        return with_rows(model, kept), {}
    tokens = Tokens(data, "val", verify=False)
    windows_WT1 = Windows(tokens, settings.sequence_tokens, seed=None).spread(settings.pretrain.validation_sequences)
    nats = dropped_nats(model, [torch.tensor(kept)[windows_WT1[:, :-1]]], kept)
    smaller = with_rows(model, kept)
    sizes = [sum(part.numel() for part in each.parameters()) for each in (model, smaller)]
    print(
        f"teacher: {len(kept):,} of {model.shape.vocab_size:,} tokens kept, {sizes[1]:,} of {sizes[0]:,} parameters",
        flush=True,
    )
    return smaller, {GAIN: nats / math.log(2) / tokens.bytes_per_token, "parameters_dropped": sizes[0] - sizes[1]}


def sources_of(settings, place: Place) -> dict[str, str]:
    """Where the teacher comes from, by checksum: nowhere, or a folder, which must be the one that `prepare` saw."""
    files = teacher_fingerprint(settings.teacher, place.root)
    if files is None:
        return {}
    card, path = read_card(place.read("artifacts/data")), settings.teacher.path
    if card.get("teacher") != files:
        raise Refusal(f"artifacts/data was not made with {path} as it is now: run dvc repro prepare")
    if ("trimmed" in card) is not settings.teacher.trim_vocabulary:
        wanted = str(settings.teacher.trim_vocabulary).lower()
        raise Refusal(f"artifacts/data was not made with teacher.trim_vocabulary = {wanted}: run dvc repro prepare")
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
    metrics |= teacher["notes"]
    if sources:
        metrics["source"] = "folder"
    write_json(place.write("metrics/pretrain.json"), rounded(metrics))
    run.metrics({"validation_bits_per_byte": teacher["validation_bits_per_byte"]})
    figures = {key: metrics[key] for key in ("validation_bits_per_byte", "tokens", *teacher["notes"])}
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
