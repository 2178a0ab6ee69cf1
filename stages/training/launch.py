"""Starts the ranks of a training stage where `engine` says, on this machine through the launcher `trainer.launcher`.

The stage process itself is never a rank: it composes the settings once, and a Hydra sweep or a retry can never give two
ranks different hyperparameters. Nor does it import torch, whose import costs seconds.
"""

import contextlib
import json
import shutil
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

from stages.files.artifacts import Refusal, read_json, rounded, write_atomically, write_json
from stages.files.resuming import ResumeState, resume_and_run_key
from stages.run.entry import NothingKept, Place
from stages.settings.schema import refuse_uneven_batches
from stages.settings.untracked import OBSERVERS, divided
from stages.training.job import Job, name_of, plain_settings
from stages.training.moving import counted, settle_in, told, without_place
from stages.training.placement import Away, placed, rehearse

NEEDED_BYTES = 65536  # for the reason and the results that ranks write
TAIL_S = 1.0  # between two looks at what rank zero has written


def launch(build_fits: Callable, settings, place, inputs: list[str], run) -> tuple[dict, dict]:
    """Trains in every rank what `build_fits(settings, place, keep)` yields; the ranks import that function by its name.

    Returns rank zero's results by name of the fit, and the conditions. A failure of any rank ends all of them; its
    one-line reason is raised here as a Refusal.
    """
    function = name_of(build_fits)
    stage = function.partition(":")[0].rpartition(".")[2]
    for path in inputs:
        if not place.read(path).exists():
            raise Refusal(f"{path} is missing: run the stage that writes it (dvc repro)")
    engine, started = settings.engine, time.monotonic()
    with placed(settings, stage, place.root) as ranks:
        run.follow()
        conditions = ranks.conditions(settings.trainer.model_dump())
        refuse_uneven_batches(settings, conditions["ranks"])
        plain = plain_settings(settings)
        few_steps = settings.trainer.fast_dev_run
        tracked, trial = divided(plain)[0], ["fast_dev_run", few_steps] if few_steps else []
        anywhere = [without_place(tracked), *trial]
        paths = [place.read(path) for path in inputs]
        key, same_run = resume_and_run_key(stage, [tracked, conditions, *trial], anywhere, paths)
        own = f"-node{engine.node_rank}" if engine.node_rank else ""  # nodes may share the folder of the project
        with ResumeState(place.root, stage, key + own) as state:
            where = f"{settings.trainer.strategy} on {counted(conditions['ranks'])}"
            if engine.node_rank == 0 and not engine.dry_run:  # the others are given what node 0 goes on from
                if said := settle_in(state, place.root, same_run, where, settings.trainer.move):
                    print(f"{stage}: {said}", flush=True)
            away = isinstance(ranks, Away)
            for name in ("error.txt", "steps.jsonl", *([] if away else ["result.json"])):  # of an interrupted run of it
                (state.folder / name).unlink(missing_ok=True)
            job_place = Place(place.root, state.folder / "outs") if away else place
            precision = conditions["precision"]
            job = Job(stage, function, settings, job_place, state.folder, accelerator(conditions), precision)
            job_file = job.write()
            if engine.dry_run:
                rehearse(settings, stage, job_file, place.root, conditions["ranks"])
            if not away:  # an engine says what it has started, once it has
                _announce(stage, plain, conditions)
            with _record_steps(state.folder / "steps.jsonl", run) as speeds:
                code = ranks.run(job_file)
            if code != 0:
                raise Refusal(_reason(stage, code, state.folder))
            if engine.node_rank == 0:
                result = read_json(state.folder / "result.json")
            if away:
                conditions = read_json(state.folder / "conditions.json")
                bring_home(job_place.out, place)
    if engine.node_rank:
        raise NothingKept(f"{stage}: node {engine.node_rank} of {engine.nodes} is done; node 0 writes the outs")
    if few_steps:
        raise NothingKept(f"{stage}: trainer.fast_dev_run: {', '.join(result)} went through; no model was kept")
    observed = {name: observer_targets(getattr(settings, name)) for name in OBSERVERS if getattr(settings, name)}
    clock = {"seconds": time.monotonic() - started, "ranks": conditions["ranks"]}
    clock |= {"accelerator": accelerator(conditions)}
    took = {f"{name}/seconds": fit["seconds"] for name, fit in result.items()}
    moved = {name: fit["moved"] for name, fit in result.items() if fit["moved"]}
    certificates = {"moved": moved} if moved else {}
    write_json(place.write(f"measurements/{stage}.json"), rounded(clock | speeds | took) | certificates)
    return result, conditions | observed | ({"moved": told(moved)} if moved else {})


def observer_targets(wanted: dict[str, dict]) -> str:
    """The classes by which callbacks and loggers are recorded as a condition: a callback may change what is trained."""
    return ", ".join(sorted(entry["_target_"] for entry in wanted.values()))


def _announce(stage: str, plain: dict, conditions: dict) -> None:
    if not conditions.get("compiled", True):
        slow = "no gcc and no clang here: training runs uncompiled and takes half as long again"
        print(f"{stage}: {slow}", flush=True)
    print(f"{stage}: {_extent(stage, plain, conditions['ranks'])}, starting", flush=True)


def _extent(stage: str, plain: dict, ranks: int) -> str:
    steps, few = plain[stage].get("recovery", plain[stage]).get("steps"), int(plain["trainer"]["fast_dev_run"])
    if few:
        steps = min(steps or few, few)
    said = f", {steps} step{'s' if steps > 1 else ''} per model" if steps else ""
    return f"{counted(ranks)}{said}"


def _reason(stage: str, code: int, state: Path) -> str:
    """Why the ranks failed, in one line."""
    error = state / "error.txt"
    if error.exists():
        return error.read_text().strip()
    free = shutil.disk_usage(state).free
    if free < NEEDED_BYTES:
        return f"{state} is on a full disk ({free:,} bytes are free): make room there, then run the command again"
    return f"a rank of {stage} ended with code {code}; its last words are in {state / 'ranks.log'}"


def accelerator(conditions: dict) -> str:
    """As Lightning calls it; auto where only the ranks will know."""
    found = conditions["accelerator"]
    return found if found in ("auto", "cpu", "gpu") else "cpu" if found == "none" else "gpu"


def bring_home(outs: Path, place: Place) -> None:
    """What ranks elsewhere wrote, to where they would have written here."""
    for path in sorted(outs.rglob("*")):
        if path.is_file():
            write_atomically(place.write(path.relative_to(outs).as_posix()), path.read_bytes())


@contextlib.contextmanager
def _record_steps(path: Path, run) -> Iterator[dict[str, float]]:
    """Hands rank zero's figures to the record of the run while they are written; yields the last speed of each fit."""
    speeds: dict[str, float] = {}
    ended = threading.Event()

    def tail():
        position, last = 0, False
        while not last:
            last = ended.wait(TAIL_S)  # what was written before the end is still read
            position = _hand_over(path, position, run, speeds)

    thread = threading.Thread(target=tail)
    thread.start()
    try:
        yield speeds
    finally:
        ended.set()
        thread.join()


def _hand_over(path: Path, position: int, run, speeds: dict[str, float]) -> int:
    """Records the whole lines from this position on; returns where the next begins."""
    try:
        with path.open("rb") as file:
            file.seek(position)
            lines = file.read().split(b"\n")[:-1]  # the last piece is being written, or empty
    except OSError:  # no step was logged yet
        return position
    for line in lines:
        with contextlib.suppress(ValueError):  # cut short by a full disk
            row = json.loads(line)
            run.metrics(row["figures"], step=row["step"], at=row["time"])
            speeds |= {k: v for k, v in row["figures"].items() if k.endswith("tokens_per_second")}
    return position + sum(len(line) + 1 for line in lines)


def write_costs(place, stage: str, result: dict) -> None:
    """What each model is and what its training took: nothing here depends on the weights."""
    write_json(place.write(f"artifacts/costs/{stage}.json"), {name: fit["made"] for name, fit in result.items()})


def write_curves(place, stage: str, result: dict) -> None:
    """The training curve of each fit as a CSV of its own, which DVC draws as a line of its own.

    An empty field where a step was not validated, or there was no step.
    """
    for name, fit in rounded(result).items():
        lines = ["step,loss,validation_bits_per_byte"]
        for row in fit["curve"]:
            loss, bits = ("" if row[key] is None else row[key] for key in ("loss", "validation_bits_per_byte"))
            lines.append(f"{row['step']},{loss},{bits}")
        write_atomically(place.write(f"plots/{stage}/{name}.csv"), "\n".join(lines) + "\n")
