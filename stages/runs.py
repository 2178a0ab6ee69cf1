"""How a stage is entered: by DVC with its sections of resolved.yaml, or by hand with Hydra.

dvc repro distill                                # reads resolved.yaml, writes DVC's outs
python -m stages.distill distill.temperature=2   # composes, writes into outputs/distill/<time>/
python -m stages.distill -m distill.temperature=1,2,4   # a sweep in multirun/distill/<time>/<job>/
"""

import contextlib
import errno
import itertools
import os
import signal
import sys
import traceback
from dataclasses import dataclass
from pathlib import Path
from typing import NoReturn

import yaml

from stages.artifacts import ROOT, Refusal, read_json, write_atomically, write_json
from stages.resuming import only_holder, remove_recorded
from stages.settings import as_yaml, offer_sheet, one_line_errors, validate

DISK_ERRORS = (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES, errno.EPERM)  # for the user to mend


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


@dataclass
class Job:
    """One job of a Hydra run or sweep, for the table at its end."""

    number: str
    overrides: list[str]
    folder: Path
    metrics: dict[str, float]
    failure: str = ""


def run_stage(main, name: str, sections) -> None:
    """Run `main(settings, place, run)`; a Refusal, or what Hydra refuses, is one line and exit code 1.

    It may return {"conditions": {...}, "inputs": {...}}: what its outs depend on and only it knows.
    """
    try:
        if "DVC_STAGE" in os.environ:
            _run_under_dvc(main, name, tuple(sections))
        else:
            _run_by_hand(main, name, tuple(sections))
    except Refusal as refusal:
        _say(refusal)
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
    if not isinstance(plain, dict) or any(section not in plain for section in sections):
        raise Refusal(f"resolved.yaml lacks one of {', '.join(sections)}: run dvc repro config")
    return {section: plain[section] for section in sections}


def _run_tracked(main, name, plain, sections, place, sweep):
    settings = validate(plain, sections)
    from stages.tracking import start_run  # late: a refused setting should not wait for MLflow's import

    try:
        with start_run(stage=name, settings=plain, out=place.out, root=place.root, sweep=sweep) as run:
            own = main(settings, place, run) or {}
            if place.out == place.root:
                _leave_record(name, own, place)
    except OSError as error:
        if error.errno not in DISK_ERRORS:
            raise
        at = error.filename or place.out
        raise Refusal(f"{name} could not write ({error.strerror}: {at}): mend that and repeat the command") from None


def _leave_record(name, own, place):
    """What made these outs, beside them; and a word on how they compare with the committed ones."""
    from stages import compare, provenance  # late: neither is needed to refuse a setting

    if not provenance.is_recorded(name, place.root):
        return
    record = provenance.record(name, own, place.root)
    write_json(place.write(provenance.record_path(name)), record)
    record = read_json(place.read(provenance.record_path(name)))  # as written: numbers are rounded
    committed = compare.committed(place.root, name)
    told = committed and compare.sentence(name, compare.compare(committed, record))
    if told:
        _say(told)


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
    jobs = []
    debug = os.environ.get("HYDRA_FULL_ERROR") == "1"

    def work(cfg):
        os.environ.pop("HYDRA_FULL_ERROR", None)
        return _run_job(main, name, sections, cfg, jobs)

    work.__module__ = f"stages.{name}"  # Hydra names the job, and so its folder, after this
    arguments = sys.argv[1:]
    offer_sheet(arguments)
    _refuse_outside(arguments, name)
    import hydra

    os.environ["HYDRA_FULL_ERROR"] = "1"  # Hydra raises instead of printing: it becomes one line here
    try:
        with contextlib.nullcontext() if debug else one_line_errors():
            hydra.main(version_base="1.3", config_path=str(ROOT / "conf"), config_name="config")(work)()
    finally:
        os.environ.pop("HYDRA_FULL_ERROR", None)
        if jobs and jobs[0].number:
            print(table_of(jobs), flush=True)
    failed = [job for job in jobs if job.failure]
    if failed and failed[0].number:
        count = f"{len(failed)} of {len(jobs)} jobs failed"
        raise Refusal(f"{count}, first job {failed[0].number}: {failed[0].failure}")
    if failed:
        raise Refusal(failed[0].failure)


def _refuse_outside(arguments, name):
    """Composes every job as Hydra will, and refuses what would write outside the project before a folder is made."""
    from hydra import compose, initialize_config_dir
    from hydra._internal.utils import get_args_parser
    from hydra.core.global_hydra import GlobalHydra
    from hydra.core.hydra_config import HydraConfig
    from hydra.core.override_parser.overrides_parser import OverridesParser
    from omegaconf import read_write

    options = get_args_parser().parse_args(arguments)
    for option in ("config_path", "config_name", "config_dir", "experimental_rerun"):  # the last reads a pickle
        if getattr(options, option):
            raise Refusal(f"--{option.replace('_', '-')}: settings come from params.yaml and conf/ only")
    with one_line_errors(Exception), initialize_config_dir(str(ROOT / "conf"), version_base="1.3", job_name=name):
        parser = OverridesParser.create(GlobalHydra.instance().config_loader())
        choices = [
            [f"{word.get_key_element()}={value}" for value in word.sweep_string_iterator()]
            if word.is_discrete_sweep()
            else [word.input_line]
            for word in parser.parse_overrides(options.overrides)
            if word.is_discrete_sweep() or not word.is_sweep_override()  # an interval, of Optuna's, is numbers
        ]
        if not any("hydra" in word for word in options.overrides):
            choices = [values[:1] for values in choices]  # by default a job's folder is its number
        for words in itertools.product(*choices):
            cfg = compose("config", [*words, "hydra.job.num=0", "hydra.job.id=0"], return_hydra_config=True)
            HydraConfig.instance().set_config(cfg)
            sweep = cfg.hydra.sweep.dir
            for folder in (cfg.hydra.run.dir, sweep, os.path.join(sweep, cfg.hydra.sweep.subdir)):
                _refuse_unless_inside(folder)
                _refuse_unless_inside(os.path.join(folder, cfg.hydra.output_subdir or ".hydra"))
                with read_write(cfg.hydra.runtime):
                    cfg.hydra.runtime.output_dir = folder
                for logging in (cfg.hydra.job_logging, cfg.hydra.hydra_logging):
                    for handler in logging.get("handlers", {}).values():
                        _refuse_unless_inside(handler.get("filename", folder))


def _refuse_unless_inside(path):
    """Reading may be from anywhere. A symbolic link under the project is its owner's will, `..` behind it is not."""
    plainly = ".." not in Path(path).parts and Path(os.path.abspath(path)).is_relative_to(ROOT)
    if not plainly and not Path(path).resolve().is_relative_to(ROOT):
        raise Refusal(f"{path}: a run writes inside {ROOT} only; for another disk put a symbolic link there")
    if Path(path).resolve() == ROOT:
        raise Refusal(f"{path}: a run by hand would overwrite DVC's outs here; name a folder such as outputs/mine")


def _run_job(main, name, sections, cfg, jobs):
    """One job in its own folder; in a sweep a failing job leaves the others running."""
    from hydra.core.hydra_config import HydraConfig
    from hydra.types import RunMode
    from omegaconf import OmegaConf

    hydra_cfg = HydraConfig.get()
    sweeping = hydra_cfg.mode == RunMode.MULTIRUN
    job = Job(
        number=str(hydra_cfg.job.num) if sweeping else "",
        overrides=list(hydra_cfg.overrides.task),
        folder=Path(hydra_cfg.runtime.output_dir),
        metrics={},
    )
    jobs.append(job)
    if sweeping:
        _say(f"{name} job {job.number}: {' '.join(job.overrides)}")
    try:
        _refuse_unless_inside(job.folder)  # a sweeper's own choice may have come into its name
        with one_line_errors():
            plain = OmegaConf.to_container(cfg, resolve=True, throw_on_missing=True)
        validate(plain)  # all of it: a typo in a section of another stage is still a typo
        write_atomically(job.folder / "resolved.yaml", as_yaml(plain))
        sweep = Path(hydra_cfg.sweep.dir).resolve() if sweeping else None
        own = {section: plain[section] for section in sections}
        _run_tracked(main, name, own, sections, Place(ROOT, job.folder), sweep)
        job.metrics = _headline(job.folder / "metrics" / f"{name}.json")
        _say(f"{name} wrote {os.path.relpath(job.folder)}")
    except Refusal as refusal:
        job.failure = str(refusal)
        if sweeping:
            _say(refusal)
    except Exception as error:
        if not sweeping:
            raise
        traceback.print_exc()
        job.failure = f"{type(error).__name__}: {error}".split("\n")[0]
    score = best_key([job])
    return job.metrics[score] if score else float("inf")  # what a sweeper such as Optuna minimises


def _headline(path):
    if not path.exists():
        return {}
    numbers = read_json(path).items()
    return {k: v for k, v in numbers if isinstance(v, (int, float)) and not isinstance(v, bool)}


def best_key(jobs: list[Job]) -> str | None:
    """The metric that ranks jobs: bits per byte, of the student where several models have one."""
    keys = {key for job in jobs for key in job.metrics if "bits_per_byte" in key}

    def rank(key):
        return ("validation" not in key, not key.startswith("validation"), "student" not in key, key)

    return min(keys, key=rank, default=None)


def table_of(jobs: list[Job], columns: int = 4) -> str:
    """The jobs of a sweep, aligned, and the best of them."""
    score = best_key(jobs)
    keys = list(dict.fromkeys(key for job in jobs for key in job.metrics))
    keys.sort(key=lambda key: (key != score, "bits_per_byte" not in key))
    keys = keys[:columns]
    rows = [["job", "overrides", *keys]]
    for job in jobs:
        numbers = [f"{job.metrics[key]:.6g}" if key in job.metrics else "-" for key in keys]
        rows.append([job.number, " ".join(job.overrides) or "-", *numbers])
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    lines = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)) for row in rows]
    for i, job in enumerate(jobs, start=1):
        lines[i] = f"{lines[i]}  {job.failure}"
    ranked = [job for job in jobs if score in job.metrics]
    if score and ranked:
        best = min(ranked, key=lambda job: job.metrics[score])
        lines.append(
            f"best: job {best.number} ({' '.join(best.overrides)}), {score} {best.metrics[score]:.6g}"
        )
        lines.append(f"      in {os.path.relpath(best.folder)}")
    return "\n".join(["", *(line.rstrip() for line in lines)])


def _say(message):
    """One line to the person, whatever the terminal can encode."""
    line = " ".join(f"offramp: {message}".split())
    print(line.encode("utf-8", "backslashreplace").decode("utf-8"), file=sys.stderr, flush=True)
