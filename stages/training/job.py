"""What a training stage asks of its ranks: one typed object, its writer and its reader.

The stage writes `<state>/job.json`, a launcher hands its path to every rank, and a rank reads it. The paths in it are
relative to it, so that the project's folder may stand elsewhere on another machine.
"""

import inspect
import os
from collections.abc import Callable
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Any

from stages.files.artifacts import ROOT, Refusal, read_json, write_json
from stages.run.entry import Place
from stages.settings.schema import Settings, validate


@dataclass(frozen=True)
class Job:
    stage: str
    build_fits: str  # "module:function", which every rank imports
    settings: Settings  # only the sections that the stage reads
    place: Place
    state: Path  # the folder of checkpoints, ranks.log, steps.jsonl, result.json and error.txt
    accelerator: str  # as Lightning names it; auto: what the ranks' machine has
    precision: str  # the same

    def write(self) -> Path:
        """Writes job.json into `state`."""
        plain = {
            "stage": self.stage,
            "build_fits": self.build_fits,
            "settings": plain_settings(self.settings),
            "root": os.path.relpath(self.place.root, self.state),
            "out": os.path.relpath(self.place.out, self.state),
            "accelerator": self.accelerator,
            "precision": self.precision,
        }
        path = self.state / "job.json"
        write_json(path, plain)
        return path

    @classmethod
    def read(cls, path: Path) -> "Job":
        """The job in this file; a Refusal where it is missing or damaged."""
        plain, state = read_json(path), path.absolute().parent

        def at(name: str) -> Path:
            return Path(os.path.normpath(state / plain[name]))  # by its name: the folder may be a link

        return cls(
            stage=plain["stage"],
            build_fits=plain["build_fits"],
            settings=validate(plain["settings"], list(plain["settings"])),
            place=Place(at("root"), at("out")),
            state=state,
            accelerator=plain["accelerator"],
            precision=plain["precision"],
        )

    def fits_function(self) -> Callable:
        module, _, name = self.build_fits.partition(":")
        return getattr(import_module(module), name)


def plain_settings(settings: Settings) -> dict[str, Any]:
    """The sections that were read, as a plain dictionary."""
    return settings.model_dump(exclude_unset=True)


def is_observed(path: Path) -> bool:
    """Do callbacks or loggers of conf/ watch this job? False where it cannot be read, which `Job.read` explains."""
    try:
        settings = read_json(path)["settings"]
        return bool(settings.get("callbacks") or settings.get("logger"))
    except (Refusal, LookupError, TypeError, AttributeError):
        return False


def name_of(function: Callable) -> str:
    """"module:function" of a function that another process can import; a Refusal for any other."""
    module = function.__module__
    if module == "__main__":  # of `python -m stages.<stage>`, perhaps on another machine: a sweep sends it there
        file = Path(inspect.getfile(function)).resolve()
        module = ".".join(file.relative_to(ROOT).with_suffix("").parts) if file.is_relative_to(ROOT) else ""
    if not module or not function.__qualname__.isidentifier():
        raise Refusal(
            f"{function.__qualname__}: ranks cannot import this function: define it with a name at the top of a module,"
            " and start that module with python -m"
        )
    return f"{module}:{function.__name__}"
