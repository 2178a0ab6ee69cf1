"""The control of equal time: the student's shape, trained from nothing for the seconds that teacher and student took.

The stage `challenge` holds the operations equal, so that its steps are the same on every machine; how many steps the
same seconds give depends on the machine and its load, so this model is no part of the DAG. Run by `make claims` in the
checkout of each job, after `dvc repro evaluate`. It resumes as a stage does.
"""

from collections.abc import Iterator

from stages.challenge import COSTS, SECTIONS, from_nothing, read_costs
from stages.evaluate import save_table
from stages.files.artifacts import read_json, write_json
from stages.run.entry import Place, run_stage
from stages.training.launch import launch

MEASURED = [f"measurements/{stage}.json" for stage in ("pretrain", "distill", "challenge")]
SCORES = "artifacts/scores/timed_student.npy"


def fits(settings, place: Place, _) -> Iterator:
    fit = from_nothing("student", read_costs(place), settings, place)
    fit.steps, fit.name, fit.out = equal_steps(place), "timed_student", "artifacts/timed_student"
    yield fit


def equal_steps(place: Place) -> int:
    """Steps of the student's shape that take as long as the training of teacher and student."""
    pretrain, distill, challenge = (read_json(place.read(path)) for path in MEASURED)
    steps = read_json(place.read("metrics/challenge.json"))["scratch_student_steps"]
    seconds = pretrain["teacher/seconds"] + distill["student/seconds"]
    return max(1, round(steps * seconds / challenge["scratch_student/seconds"]))


def main(settings, place: Place, run) -> dict:
    from stages.data.shards import Tokens, load_tokenizer
    from stages.measure import scoring
    from stages.measure.subjects import load_models

    result, conditions = launch(fits, settings, place, ["artifacts/data", *COSTS, *MEASURED], run)
    tokens = Tokens(place.read("artifacts/data"), "test")
    stream = scoring.read_stream(tokens, load_tokenizer(place.read("artifacts/data")), settings.evaluate.test_tokens)
    model = load_models(place.write("artifacts"), tokens.vocab_size, ["timed_student"])
    tables = scoring.score(
        model, stream, settings.sequence_tokens, settings.evaluate.batch_sequences, reference="timed_student"
    )
    save_table(place.write(SCORES), tables["timed_student"])
    fit = result["timed_student"]
    figures = {"timed_student_steps": fit["curve"][-1]["step"], "timed_student_seconds": fit["seconds"]}
    write_json(place.write("metrics/challenge.json"), figures)
    return {"conditions": conditions}


if __name__ == "__main__":
    run_stage(main, "challenge", (*SECTIONS, "evaluate"))
