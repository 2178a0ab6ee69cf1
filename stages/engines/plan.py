"""The launch plan: what any engine is told of a training job, and the command that each of its nodes runs."""

import math
import shlex
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from stages.engines import engine
from stages.files.artifacts import Refusal
from stages.settings.engine import Engine
from stages.settings.lightning import duration_seconds
from stages.settings.reading import refuse_first
from stages.tracking.redaction import holds_secret, is_secret


@dataclass(frozen=True)
class LaunchPlan:
    """Nothing here is a secret: what is rendered from it is kept. Paths are those on the nodes."""

    name: str  # of the job: letters, digits, hyphens
    nodes: int
    processes_per_node: int
    python: str
    project: str  # the project's folder, which all nodes share
    job: str  # the file that the ranks read; its folder holds checkpoints, results and logs
    environment: dict[str, str]
    cpus_per_node: int | None
    gpus_per_node: int
    memory_gigabytes_per_node: int | None
    time_limit_seconds: int | None
    master_address: str | None
    master_port: int
    join_seconds: float
    options: Any  # of the engine's class Options

    @property
    def state(self) -> str:
        return self.job.rpartition("/")[0]


def plan_of(settings: Engine, stage: str, job: Path, root: Path, ranks: int) -> LaunchPlan:
    """The plan of a job that stands in a state folder below `root`."""
    refuse_secrets(settings.environment, settings.options)
    project = settings.project or str(root)
    return LaunchPlan(
        name=f"offramp-{stage}-{job.parent.name.rpartition('-')[2][:8]}",
        nodes=settings.nodes,
        processes_per_node=ranks // settings.nodes,
        python="python" if settings.project else sys.executable,
        project=project,
        job=f"{project.rstrip('/')}/{job.relative_to(root).as_posix()}",
        environment=dict(settings.environment),
        cpus_per_node=settings.cpus_per_node,
        gpus_per_node=settings.gpus_per_node,
        memory_gigabytes_per_node=settings.memory_gigabytes_per_node,
        time_limit_seconds=duration_seconds(settings.time_limit) if settings.time_limit else None,
        master_address=settings.master_address,
        master_port=settings.master_port,
        join_seconds=settings.join_seconds,
        options=options_of(settings),
    )


def refuse_secrets(environment: Mapping[str, Any], options: Mapping[str, Any]) -> None:
    """What an engine is given is kept: in its document, in job.json, in the record of the run."""
    advice = "keep it in the engine's own store of secrets, or in the environment of the nodes"
    given = [("environment", *pair) for pair in environment.items()] + [("options", *pair) for pair in options.items()]
    for section, name, value in given:
        named = section == "environment" and is_secret(name)
        if named or holds_secret(str(value)):
            why = "has a secret's name" if named else "holds a password or token"
            raise Refusal(f"engine.{section}.{name}: {why}, and what is rendered is kept: {advice}")


def options_of(settings: Engine) -> Any:
    """engine.options as the engine's class has them; a Refusal of the first mistake."""
    options = engine(settings.name).Options
    try:
        return options.model_validate(settings.options)
    except ValidationError as error:
        try:
            refuse_first(error, options)
        except Refusal as refusal:
            raise Refusal(f"engine.options.{refusal}") from None


def rank_count(ranks: int | str, nodes: int, per_node: int | None, gpus_per_node: int) -> int:
    """Of all nodes. `auto` is a rank for each GPU, and two in all on CPUs, so that one more node changes no bytes."""
    if per_node:
        return nodes * per_node
    if ranks != "auto":
        return int(ranks)
    return nodes * (gpus_per_node or math.ceil(2 / nodes))


def node_options(plan: LaunchPlan, master_port: str | None = None) -> list[str]:
    """Of stages/training/node.py, as far as they are the same on each node; the port is the plan's, or the engine's."""
    counts = ["--nodes", str(plan.nodes), "--processes", str(plan.processes_per_node)]
    return [*counts, "--master-port", master_port or str(plan.master_port), "--join-seconds", f"{plan.join_seconds:g}"]


def node_words(plan: LaunchPlan, node_rank: str, master_address: str, master_port: str | None = None) -> list[str]:
    """What every engine starts once on each node: the agent that starts the node's ranks."""
    words = [plan.python, "-m", "stages.training.node", plan.job, *node_options(plan, master_port)]
    return [*words, "--node-rank", node_rank, "--master-address", master_address]


def node_command(plan: LaunchPlan, node_rank: str, master_address: str, master_port: str | None = None) -> str:
    """As a line of shell, in which the engine's own variables, such as "$SLURM_NODEID", are still to be filled in."""
    words = node_words(plan, node_rank, master_address, master_port)
    own = {node_rank, master_address, master_port}
    return " ".join(word if word in own else shlex.quote(word) for word in words)


def required(name: str, value: Any, what: str) -> Any:
    """An option without which the engine's document would be of no use."""
    if value is None:
        raise Refusal(f"engine.options.{name}: missing: {what}")
    return value
