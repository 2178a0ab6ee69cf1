"""How a stage is entered: by DVC with its sections of resolved.yaml, or by hand with Hydra.

dvc repro distill                                # reads resolved.yaml, writes DVC's outs
python -m stages.distill distill.temperature=2   # composes, writes into outputs/distill/<time>/
python -m stages.distill -m distill.temperature=1,2,4   # a sweep in multirun/distill/<time>/<job>/
"""

import contextlib
import os
import signal
import sys
import traceback
import uuid
from dataclasses import dataclass
from pathlib import Path
from typing import NoReturn

import yaml

from stages.files.artifacts import ROOT, Refusal, write_atomically, write_json
from stages.files.resuming import only_holder, remove_recorded
from stages.files.streams import disk_refusals, fill_closed_streams, shield_output
from stages.settings.reading import picked
from stages.settings.schema import as_yaml, parse, validate
from stages.settings.untracked import joined, with_observers


class NothingKept(Refusal):
    """A stage went through, as a trial by hand (`trainer.fast_dev_run`), and leaves no outs."""


@dataclass(frozen=True)
class Place:
    """Where a stage reads and where it writes; paths such as "artifacts/teacher" are the same in both."""

    root: Path
    out: Path

    def read(self, path: str) -> Path:
        return self.root / path

    def write(self, path: str) -> Path:
        (self.out / path).parent.mkdir(parents=True, exist_ok=True)
        return self.out / path


def run_stage(main, name: str, sections) -> None:
    """Run `main(settings, place, run)`; a Refusal, or what Hydra refuses, is one line and exit code 1.

    It may return {"conditions": {...}, "inputs": {...}}: what its outs depend on and only it knows.
    """
    fill_closed_streams()
    shield_output()
    sections, started_in = with_observers(sections), Path.cwd()
    try:
        with disk_refusals(name, ROOT):
            if "DVC_STAGE" in os.environ:
                _run_under_dvc(main, name, sections)
            else:
                _run_by_hand(main, name, sections)
        sys.stdout.flush()
    except Refusal as refusal:
        elsewhere = f" in {ROOT}" if "dvc repro" in str(refusal) and started_in != ROOT else ""
        _say(f"{refusal}{elsewhere}")
        sys.exit(1)
    except KeyboardInterrupt as interruption:
        _say(str(interruption) or "interrupted; the same command continues where it can")
        sys.exit(130)


def _run_under_dvc(main, name, sections):
    if sys.argv[1:]:
        raise Refusal(f"{' '.join(sys.argv[1:])}: under DVC a stage takes its settings from params.yaml only")
    die_with_parent()
    refusal = f"{name} is already running here: wait for its end, then run it again"
    with only_holder(ROOT / ".runs" / f"{name}.lock", name, refusal):  # two copies must not write the same outs
        remove_recorded(ROOT)
        plain = _resolved(ROOT / "resolved.yaml", sections)
        _run_tracked(main, name, plain, sections, Place(ROOT, ROOT), sweep=None)


def _resolved(path, sections):
    try:
        plain = yaml.safe_load(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise Refusal("resolved.yaml is missing: run dvc repro config") from None
    except (yaml.YAMLError, UnicodeDecodeError):
        raise Refusal("resolved.yaml is damaged: delete it and run dvc repro config") from None
    plain = joined(plain) if isinstance(plain, dict) else {}
    found = picked(plain, sections)
    if any(name.partition(".")[0] not in found for name in sections):
        raise Refusal(f"resolved.yaml lacks one of {', '.join(sections)}: run dvc repro config")
    return found


def _run_tracked(main, name, plain, sections, place, sweep):
    settings = validate(plain, sections)
    from stages.tracking.record import Run, start_run  # late: a refused setting need not wait for their imports

    is_trial = settings.trainer is not None and settings.trainer.fast_dev_run
    recording = start_run(stage=name, settings=plain, out=place.out, root=place.root, sweep=sweep)
    with disk_refusals(name, place.out), contextlib.nullcontext(Run()) if is_trial else recording as run:
        own = main(settings, place, run) or {}
        if place.out == place.root:
            _leave_record(name, own, place)


def _leave_record(name, own, place):
    """What made these outs, beside them; and a word on how they compare with the committed ones."""
    from stages.run import (
        compare,
        provenance,  # late: neither is needed to refuse a setting
    )

    if not provenance.is_recorded(name, place.root):
        return
    record = provenance.record(name, own, place.root)
    write_json(place.write(provenance.record_path(name)), record)
    committed = compare.committed(place.root, name)
    message = committed and compare.sentence(name, compare.compare(committed, record))
    if message:
        _say(message)


def die_with_parent(parent=None):
    """Linux: the kernel ends this process when its parent dies, even by SIGKILL.

    A stage whose dvc was killed would meet a second copy of itself, and a rank would be orphaned.
    """
    if sys.platform != "linux":
        return
    import ctypes

    parent = parent or os.getppid()
    ctypes.CDLL(None).prctl(1, signal.SIGTERM)  # PR_SET_PDEATHSIG
    if os.getppid() != parent:  # it died just before
        sys.exit(1)


def leave(code: int) -> NoReturn:
    """Ends a process that has nothing left to write: taking torch and Lightning down in order takes a second."""
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def _run_by_hand(main, name, sections):
    from stages.run import sweeps  # late, like Hydra itself: under DVC nothing needs them
    from stages.run.commandline import refuse_arguments
    from stages.settings.compose import offer_sheet, one_line_errors

    debug = os.environ.get("HYDRA_FULL_ERROR") == "1"
    sweep, alone = uuid.uuid4().hex, []

    def work(cfg):
        raising = os.environ.pop("HYDRA_FULL_ERROR", None)
        outcome = _run_job(main, name, sections, cfg, sweep)
        os.environ.update({"HYDRA_FULL_ERROR": raising} if raising else {})
        alone.append(outcome)  # of a sweep's jobs, which may run in other processes, the folders tell
        return outcome.score(name)

    work.__module__ = f"stages.{name}"  # Hydra names the job, and so its folder, after this
    arguments = sys.argv[1:] = offer_sheet(sys.argv[1:])
    refuse_arguments(arguments, name, sections)
    if {"--help", "-h"} & {*arguments}:
        print(sys.modules[main.__module__].__doc__)  # what the stage does, before Hydra's list of settings
    import hydra

    os.environ["HYDRA_FULL_ERROR"] = "1"  # Hydra raises instead of printing: it becomes one line here
    ended = None
    try:
        with contextlib.nullcontext() if debug else one_line_errors(), disk_refusals(name, ROOT):
            hydra.main(version_base="1.3", config_path=str(ROOT / "conf"), config_name="config")(work)()
    except (Exception, KeyboardInterrupt) as error:
        if sweeps.SweepFolder.found is None or debug:
            raise
        ended = error
    finally:
        os.environ.pop("HYDRA_FULL_ERROR", None)
    if sweeps.SweepFolder.found:
        sweeps.show(name, sweep, ended)
    elif alone and alone[0].failure:
        raise Refusal(alone[0].failure)


def _run_job(main, name, sections, cfg, sweep):
    """One job in its own folder; in a sweep a failing job leaves the others running."""
    from hydra.core.hydra_config import HydraConfig
    from hydra.core.override_parser.overrides_parser import OverridesParser
    from hydra.types import RunMode
    from omegaconf import OmegaConf

    from stages.run.commandline import refuse_taken, refuse_without_effect
    from stages.run.sweeps import LOST, Outcome, numbers_of
    from stages.settings.compose import one_line_errors, plain_values

    hydra_cfg = HydraConfig.get()
    sweeping = hydra_cfg.mode == RunMode.MULTIRUN
    overrides = OmegaConf.to_container(hydra_cfg.overrides.task, resolve=False)
    number = str(hydra_cfg.job.num) if sweeping else ""
    job = Outcome(number, overrides, Path(hydra_cfg.runtime.output_dir), failure=LOST)
    refuse_taken(job.folder)  # a sweeper's own choice may have come into its name
    if sweeping:
        _say(f"{name} job {job.number}: {' '.join(job.overrides)}")
        job.leave(sweep)
    try:
        with one_line_errors():
            plain = plain_values(cfg)
        parse(plain)  # all of it: a typo in a section of another stage is still a typo
        if sweeping:  # a sweeper has words of its own, from its configuration
            refuse_without_effect(OverridesParser.create().parse_overrides(overrides), name, sections)
        write_atomically(job.folder / "resolved.yaml", as_yaml(plain))
        folder = Path(hydra_cfg.sweep.dir).resolve() if sweeping else None
        _run_tracked(main, name, picked(plain, sections), sections, Place(ROOT, job.folder), folder)
        job.metrics, job.failure = numbers_of(job.folder / "metrics" / f"{name}.json"), ""
        _say(f"{name} wrote {os.path.relpath(job.folder, hydra_cfg.runtime.cwd)}")
    except NothingKept as trial:
        job.failure = ""
        _say(trial)
    except Refusal as refusal:
        job.failure = str(refusal)
        if sweeping:
            _say(refusal)
    except Exception as error:
        if not sweeping:
            raise
        traceback.print_exc()
        job.failure = f"{type(error).__name__}: {error}".split("\n")[0]
    if sweeping:
        job.leave(sweep)
    return job


def _say(message):
    """One line to the person, whatever the terminal can encode."""
    line = " ".join(f"offramp: {message}".split())
    with contextlib.suppress(OSError):  # a terminal that has gone must not cost the work
        sys.stderr.write(line.encode("utf-8", "backslashreplace").decode("utf-8") + "\n")  # at once: jobs share it
        sys.stderr.flush()
