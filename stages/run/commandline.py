"""What may be typed after a stage's name: checked before a folder is made or a job starts."""

import functools
import itertools
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import yaml

from stages.engines.plan import refuse_secrets
from stages.files.artifacts import ROOT, Refusal
from stages.settings.compose import one_line_errors, preset_groups, preset_of
from stages.settings.reading import refuse_unknown
from stages.settings.schema import SECTIONS
from stages.settings.untracked import with_observers

IGNORED_ALONE = ("hydra/launcher", "hydra/sweeper", "hydra.launcher", "hydra.sweeper", "hydra.sweep")
BASH_COMPLETION = """\
_offramp_completion() {
    local words=($COMP_LINE)
    [[ "${words[1]}" == -m && "${words[2]}" == stages.* ]] || return
    local choices=$(COMP_LINE="$COMP_LINE" COMP_POINT="$COMP_POINT" \\
        "${words[0]}" -m "${words[2]}" -sc query=bash 2> /dev/null)
    COMPREPLY=($(compgen -W "$choices" -- "${words[$COMP_CWORD]}"))
}
COMP_WORDBREAKS=${COMP_WORDBREAKS//=}
complete -o nospace -o default -F _offramp_completion python python3"""
DVC_PATHS = ("deps", "outs", "metrics", "plots")


def refuse_arguments(arguments: list[str], stage: str, sections: tuple[str, ...]) -> None:
    """Composes every job as Hydra will; refuses what would write where it must not or change nothing."""
    from hydra import compose, initialize_config_dir
    from hydra._internal.utils import get_args_parser
    from hydra.core.global_hydra import GlobalHydra
    from hydra.core.hydra_config import HydraConfig
    from hydra.core.override_parser.overrides_parser import OverridesParser

    options = get_args_parser().parse_args(arguments)
    if options.shell_completion:  # what is being typed need not be right yet
        if not any(word.split("=")[0] in ("install", "uninstall", "query") for word in options.overrides):
            raise Refusal("--shell-completion needs install=bash, uninstall=bash or query=bash (or zsh, fish)")
        _complete_modules(options.overrides)
        return
    for option in ("config_path", "config_name", "config_dir", "experimental_rerun"):  # the last reads a pickle
        if getattr(options, option):
            raise Refusal(f"--{option.replace('_', '-')}: settings come from params.yaml and conf/ only")
    with one_line_errors(Exception), initialize_config_dir(str(ROOT / "conf"), version_base="1.3", job_name=stage):
        parser = OverridesParser.create(GlobalHydra.instance().config_loader())
        overrides = parser.parse_overrides(options.overrides)
        refuse_without_effect(overrides, stage, sections)
        _refuse_ignored(overrides, options.multirun)
        choices: list[list[Any]] = [
            [f"{word.get_key_element()}={value}" for value in word.sweep_string_iterator()]
            if word.is_discrete_sweep()
            else [word.input_line]
            for word in overrides
            if word.is_discrete_sweep() or not word.is_sweep_override()  # an interval, of Optuna's, is numbers
        ]
        if not any("hydra" in word for word in options.overrides):
            choices = [values[:1] for values in choices]  # by default a job's folder is its number
        for words in itertools.product(*choices):
            cfg = compose("config", [*words, "hydra.job.num=0", "hydra.job.id=0"], return_hydra_config=True)
            HydraConfig.instance().set_config(cfg)
            _refuse_secrets(cfg.engine)
            _refuse_folders(cfg.hydra)


def answer(arguments: list[str], stage: str) -> bool:
    """Lets Hydra answer --help, --hydra-help, --cfg, --info or a tab completion; False where none of them is asked."""
    from hydra._internal.utils import get_args_parser

    options, unknown = get_args_parser().parse_known_args(arguments)
    asked = options.help or options.hydra_help or options.cfg or options.info or options.shell_completion
    if unknown or not asked:
        return False
    refuse_arguments(arguments, stage, SECTIONS)
    import hydra

    def nothing(_):
        pass

    nothing.__module__ = f"stages.{stage}"  # as Hydra names the job
    sys.argv[1:] = arguments
    hydra.main(version_base="1.3", config_path=str(ROOT / "conf"), config_name="config")(nothing)()
    return True


def _complete_modules(words: list[str]) -> None:
    """Hydra completes `python file.py` only: its script for bash is replaced, its question shortened by the `-m`."""
    if words == ["install=bash"]:
        print(BASH_COMPLETION)
        sys.exit(0)
    line = os.environ.get("COMP_LINE", "")
    if found := re.match(r"\S+ +-m +", line):
        os.environ["COMP_LINE"] = f"python {line[found.end() :]}"
        os.environ["COMP_POINT"] = str(len(os.environ["COMP_LINE"]))


def _refuse_secrets(engine):
    """Before Hydra writes what was typed."""
    from omegaconf import OmegaConf

    parts = (engine.get("environment"), engine.get("options"))
    refuse_secrets(*({} if not OmegaConf.is_dict(part) else dict(part) for part in parts))


def _refuse_folders(hydra_cfg):
    from omegaconf import read_write

    sweep = hydra_cfg.sweep.dir
    for folder in (hydra_cfg.run.dir, sweep, os.path.join(sweep, hydra_cfg.sweep.subdir)):
        refuse_taken(folder)
        refuse_taken(os.path.join(folder, hydra_cfg.output_subdir or ".hydra"))
        with read_write(hydra_cfg.runtime):
            hydra_cfg.runtime.output_dir = folder
        for logging in (hydra_cfg.job_logging, hydra_cfg.hydra_logging):
            for handler in logging.get("handlers", {}).values():
                refuse_taken(handler.get("filename", folder))


def refuse_taken(path: str | Path) -> None:
    """A run by hand writes anywhere but over DVC's outs and among the project's own files.

    Both what the path says and where its symbolic links lead are looked at.
    """
    advice = "name a folder such as outputs/mine, or one outside the project"
    for place in {Path(os.path.abspath(path)), Path(path).resolve()}:
        if place == ROOT:
            raise Refusal(f"{path}: a run by hand would overwrite DVC's outs here; {advice}")
        if place.is_relative_to(ROOT):
            first = place.relative_to(ROOT).parts[0]
            if first in _taken_names() or _is_tracked(first):
                raise Refusal(f"{path}: {first} holds DVC's outs or the project's own files; {advice}")


def _taken_names() -> set[str]:
    """First parts of the paths of DVC's deps and outs, and where git and DVC keep their own."""
    stages = _dvc_stages().values()
    paths = [path for entry in stages for kind in DVC_PATHS for path in entry.get(kind, ())]
    names = [path if isinstance(path, str) else next(iter(path)) for path in paths]
    return {Path(name).parts[0] for name in names} | {".git", ".dvc", ".runs"}


@functools.cache
def _is_tracked(name: str) -> bool:
    listed = subprocess.run(["git", "-C", str(ROOT), "ls-files", "--", name], capture_output=True)
    return bool(listed.stdout.strip())


@functools.cache
def _dvc_stages() -> dict[str, Any]:
    return yaml.safe_load((ROOT / "dvc.yaml").read_text(encoding="utf-8"))["stages"]


def refuse_without_effect(overrides: list[Any], stage: str, sections: tuple[str, ...]) -> None:
    """An override of what the stage does not read would be accepted, recorded, and change nothing."""
    groups = preset_groups()
    for override in overrides:
        key = override.key_or_group
        section = key.split(".")[0]
        if section == "hydra" or section.startswith("hydra/") or override.is_delete():
            continue
        touched = {key}
        if key in groups:
            swept = override.is_discrete_sweep()
            words = override.sweep_string_iterator() if swept else [override.get_value_element_as_str()]
            words = [name for word in words for name in word.strip("[]").split(",")]  # logger=[csv,tensorboard]
            files = [ROOT / "conf" / key / f"{word}.yaml" for word in words if word in groups[key]]
            touched = {name for file in files for name in preset_of(file)}
        else:
            refuse_unknown(section, SECTIONS)
        if touched and not _overlap(touched, sections):  # the experiment `none` touches nothing
            raise Refusal(f"{key}: {stage} does not read it; {_readers(touched, stage)}")


def _overlap(names, others):
    """Is one of the settings or sections, such as teacher.path, among the others, or do they have a part of it?"""
    pairs = [(f"{one}.", f"{other}.") for one in names for other in others]
    return any(one.startswith(other) or other.startswith(one) for one, other in pairs)


def _readers(settings, stage):
    """Who reads these sections or settings, and what the stage takes from them."""
    stages = _dvc_stages()
    read = {
        name: {*with_observers(section for params in entry.get("params", []) for section in params["resolved.yaml"])}
        for name, entry in stages.items()
        if name != "config"
    }
    readers = [name for name, own in read.items() if _overlap(own, settings)]
    if not readers:
        command = min(settings).partition(".")[0]  # one beside the DAG reads the section of its name
        return f"python -m stages.{command} does"
    outs = {out if isinstance(out, str) else next(iter(out)) for name in readers for out in stages[name]["outs"]}
    taken = [path for path in stages.get(stage, {}).get("deps", ()) if path in outs and path.startswith("artifacts/")]
    names = " and ".join([", ".join(readers[:-1]), readers[-1]] if readers[1:] else readers)
    through = f" ({stage} takes {' and '.join(taken)} from there)" if taken else ""
    return f"{names} {'does' if len(readers) == 1 else 'do'}{through}"


def _refuse_ignored(overrides, multirun):
    """Hydra accepts settings of a sweep in a single run, and those of a single run in a sweep."""
    keys = [override.key_or_group for override in overrides]
    multirun = multirun or "hydra.mode" in keys
    for key in keys:
        if not multirun and key.startswith(IGNORED_ALONE):
            raise Refusal(f"{key}: only a sweep reads it; add --multirun (-m)")
        if multirun and key == "hydra.run.dir":
            raise Refusal(f"{key}: a sweep does not read it; set hydra.sweep.dir")
