"""Where the ranks of a training stage run: on this machine, on this and others, or where an engine puts them."""

import sys
from pathlib import Path
from typing import NoReturn

from stages.engines import engine
from stages.engines.plan import options_of, plan_of, rank_count
from stages.files.artifacts import Refusal, write_atomically
from stages.run.entry import NothingKept
from stages.settings.engine import Engine
from stages.settings.schema import Settings
from stages.training.launchers import Launcher, launcher
from stages.training.launchers.torchrun import Launcher as Torchrun
from stages.training.nodes import ALONE, Nodes


def placed(settings: Settings, stage: str, root: Path) -> Launcher:
    """Who starts the ranks where `engine` says."""
    asked = settings.engine
    options_of(asked)
    if asked.name == "local" and asked.processes_per_node is None:
        return launcher(settings.trainer.launcher)
    if asked.name in ("local", "torchrun"):
        return Torchrun(nodes_of(asked), asked.processes_per_node)
    return Away(settings, stage, root)


def nodes_of(asked: Engine) -> Nodes:
    if asked.nodes == 1 or asked.master_address is None:
        return ALONE
    return Nodes(asked.nodes, asked.node_rank, asked.master_address, asked.master_port, asked.join_seconds)


class Away:
    """Ranks that an engine starts on machines of its own, which see the project's folder as the plan says.

    What is unknown until they are there is left to them: Job.accelerator and Job.precision are as asked, and node 0
    leaves `conditions.json`. Outs are written below the state folder, which is all that has to come home.
    """

    def __init__(self, settings: Settings, stage: str, root: Path):
        self.settings, self.stage, self.root = settings, stage, root

    def __enter__(self) -> "Away":
        return self

    def __exit__(self, *_: object) -> None:
        pass

    def conditions(self, trainer: dict) -> dict:
        """As far as they are known before."""
        asked = self.settings.engine
        ranks = rank_count(trainer["ranks"], asked.nodes, asked.processes_per_node, asked.gpus_per_node)
        return {"ranks": ranks} | {name: trainer[name] for name in ("accelerator", "precision", "deterministic")}

    def run(self, job: Path) -> int:
        """Waits for the end of the job; a result that was brought home, or that an earlier wait has missed, is it."""
        if (job.parent / "result.json").exists():
            return 0
        name = self.settings.engine.name
        chosen = engine(name)
        if not hasattr(chosen, "run"):
            printed = f"add engine.dry_run=true to print what {chosen.START} takes"
            home = f"when it has ended, bring {job.parent} home and run this again"
            raise Refusal(f"{name} is not started from here: {printed}; {home}")
        ranks = self.conditions(self.settings.trainer.model_dump())["ranks"]
        plan = plan_of(self.settings.engine, self.stage, job, self.root, ranks)
        why = chosen.run(plan, lambda line: print(line, flush=True))
        reason = job.parent / "error.txt"
        if why and reason.exists():  # the ranks have theirs, which the stage ends with
            print(f"{self.stage}: {why}", flush=True)
        elif why:
            write_atomically(reason, why)
        return 1 if why else 0


def rehearse(settings: Settings, stage: str, job: Path, root: Path, ranks: int) -> NoReturn:
    """engine.dry_run: prints the engine's document, complete with the job that it names, and starts nothing."""
    plan = plan_of(settings.engine, stage, job, root, ranks)
    sys.stdout.write(engine(settings.engine.name).render(plan))
    sys.stdout.flush()
    raise NothingKept(f"{stage}: engine.dry_run: {settings.engine.name} would be given that; nothing was started")
