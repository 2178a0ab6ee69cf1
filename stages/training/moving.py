"""A run that stopped in one place and goes on in another: under another strategy or number of ranks, or on another
machine. How its state is found there, and what the record says of it.

A state (stages/files/resuming.py) belongs to one place: its name has the hash of all that bytes depend on, and the same
command continues there to the same bytes. What moves would end on the bytes of neither place, so it moves only where
`trainer.move` says so. Then the state of the same run (equal settings, code and inputs) is taken over: it goes on here,
and is gone where it was, so that no two runs grow from it. To move to another machine, copy the folder of the state
into .runs/resume/ there.
"""

import contextlib
import shutil
from pathlib import Path
from typing import Any, NamedTuple

from stages.files.artifacts import Refusal, read_json, write_json
from stages.files.resuming import FINISHED, STATES, ResumeState, only_holder
from stages.training.order import order_of_one_rank

RUN = "run.json"  # of a state: which run it belongs to, and where that trains
NO_CHECKPOINTS = (RUN, "job.json", "result.json")
PLACE = (
    "accelerator", "launcher", "strategy", "average_every_steps", "ranks", "activation_memory_bytes",
    "checkpoint_every_seconds",
)  # fmt: skip
OF_THE_MOVE = ("from_step", "bytes")  # of the checkpoint that was read


def without_place(settings: dict[str, Any]) -> dict[str, Any]:
    """The settings that stay the same when a run moves."""
    trainer = {key: value for key, value in settings["trainer"].items() if key not in PLACE}
    return settings | {"trainer": trainer}


class Left(NamedTuple):
    """A state of the run, and what is saved there."""

    folder: Path
    place: str
    steps: dict[str, int]  # by model

    def __str__(self) -> str:
        saved = ", ".join(f"{name} at step {step}" for name, step in sorted(self.steps.items()))
        return f"{self.place}, {saved}"


def settle_in(state: ResumeState, root: Path, run: str, place: str, move: bool) -> str:
    """Marks the state, which this process holds, as of this run and place. With `move` it takes over what the run left
    elsewhere, if it has done nothing here. Returns a line for the person, or nothing."""
    said = ""
    if _left_in(state.folder, run) is None:
        folders = sorted((root / STATES).glob(f"{state.stage}-*"))
        others = [left for folder in folders if not (folder / FINISHED).exists() and (left := _left_in(folder, run))]
        if others and not move:
            said = f"a run of these settings waits elsewhere ({others[0]}); trainer.move=true goes on with it here"
        elif others:
            furthest = max(others, key=lambda left: sum(left.steps.values()))
            _take_over(furthest, state)
            said = f"goes on with the run that was left elsewhere ({furthest})"
        elif move:
            said = f"trainer.move: {STATES} has no unfinished run of these settings; it starts from the beginning"
    write_json(state.folder / RUN, {"run": run, "place": place})
    return said


def _left_in(folder: Path, run: str) -> Left | None:
    """What this folder has saved of the run; None where it is another's, or has saved no step."""
    marked = _read(folder / RUN)
    saved = {path.stem: _read(path).get("step") for path in folder.glob("*.json") if "of" not in path.suffixes[0]}
    steps = {name: step for name, step in saved.items() if isinstance(step, int) and step > 0}
    return Left(folder, str(marked.get("place")), steps) if marked.get("run") == run and steps else None


def _read(path: Path) -> dict:
    """Nothing where it cannot be read: `Checkpoint.load` says so when a run continues from it."""
    with contextlib.suppress(Refusal, OSError):
        found = read_json(path)
        return found if isinstance(found, dict) else {}
    return {}


def _take_over(left: Left, state: ResumeState) -> None:
    """Copies, and marks the copy as of this run before it removes what was left: a kill at any moment loses nothing."""
    busy = f"{state.stage}: the run still goes on elsewhere ({left.place}): end it, then run this again"
    with only_holder(left.folder / "lock", state.stage, busy), only_holder(left.folder / "ranks.lock", "ranks", busy):
        for path in [*left.folder.glob("*.pt"), *left.folder.glob("*.json")]:
            if path.name not in NO_CHECKPOINTS:
                shutil.copy2(path, state.folder / path.name)
        write_json(state.folder / RUN, read_json(left.folder / RUN))
        shutil.rmtree(left.folder)


# ---- the record


def is_same_place(one: dict, other: dict) -> bool:
    return all(one.get(key) == other.get(key) for key in {*one, *other} - {*OF_THE_MOVE})


def certificate(fit, rank, progress) -> dict[str, Any]:
    """Where the fit was trained, from which step on, and whether it has read the windows that one rank reads who trains
    from the first step to the last; empty where it did not move."""
    if len(progress.places) == 1:
        return {}
    batches = progress.step * rank.accumulate
    expected = order_of_one_rank(rank.windows, batches, fit.batch_sequences)
    return {
        "places": {str(number): place for number, place in enumerate(progress.places)},
        "batches": batches,
        "data_order": f"0x{progress.order:016x}",
        "data_order_of_one_rank": f"0x{expected:016x}",
        "data_order_equal": progress.order == expected,
        "bytes_that_travelled": sum(place["bytes"] for place in progress.places),
    }


def told(moved: dict[str, dict]) -> str:
    """Where the fits were trained, in a line; `moved` has the certificates by name of the fit."""
    ways = []
    for name, one in moved.items():
        ways.append(f"{name}: {', '.join(_leg(place) for place in one['places'].values())}")
    return "; ".join(ways)


def _leg(place: dict) -> str:
    return f"{place['strategy']} on {counted(place['ranks'])} from step {place['from_step']}"


def counted(ranks: int) -> str:
    return f"{ranks} rank{'s' if ranks > 1 else ''}"
