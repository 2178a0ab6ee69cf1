"""Where the ranks of a training stage run: the settings of the launch plan (stages/engines/plan.py)."""

from typing import Annotated, Any

from pydantic import Field

from stages.files.artifacts import ROOT
from stages.settings.bounds import Count, Natural, Section, Word
from stages.settings.lightning import Duration
from stages.settings.reading import refuse

Few = Annotated[int, Field(ge=1, le=65536)]
Variable = Annotated[str, Field(pattern=r"^[A-Za-z_][A-Za-z0-9_]*$")]
NO_ENGINES = ("__init__", "plan")  # of the modules of stages/engines


class Engine(Section):
    name: Word  # a module of stages/engines, and a preset of conf/engine
    dry_run: bool
    nodes: Few
    processes_per_node: Few | None
    node_rank: Annotated[int, Field(ge=0, le=65535)]
    master_address: Word | None
    master_port: Annotated[int, Field(ge=1, le=65535)]
    join_seconds: Annotated[float, Field(gt=0, le=1e6)]
    time_limit: Duration
    cpus_per_node: Count | None
    gpus_per_node: Natural
    memory_gigabytes_per_node: Count | None
    project: Annotated[str, Field(pattern=r"^/[^\x00\n]*$")] | None
    environment: dict[Variable, str]
    options: dict[str, Any]  # what only this engine knows; its module says which there are


def engine_rules(settings):
    engine = settings.engine
    words = sorted({file.stem for file in (ROOT / "stages/engines").glob("*.py")} - {*NO_ENGINES})
    if engine.name not in words:
        rule = f"must be one of {', '.join(words)}; to add one, add a file to stages/engines and one to conf/engine"
        refuse("engine.name", engine.name, rule)
    if engine.name == "local" and engine.nodes > 1:
        refuse("engine.nodes", engine.nodes, "local is one machine: choose engine=torchrun, slurm or another")
    if engine.node_rank >= engine.nodes:
        refuse("engine.node_rank", engine.node_rank, f"must be below engine.nodes ({engine.nodes}): they count from 0")
    if engine.node_rank and engine.name != "torchrun":
        refuse("engine.node_rank", engine.node_rank, f"{engine.name} numbers its nodes itself; only torchrun reads it")
    if engine.name == "torchrun" and engine.nodes > 1 and engine.master_address is None:
        example = "the address of node 0 that the others reach, such as engine.master_address=10.0.0.1"
        refuse("engine.master_address", None, f"must be {example}")
    if engine.environment and engine.name in ("local", "torchrun"):
        name = min(engine.environment)  # without its value, which may be a secret
        rule = f"{engine.name} does not read it: put {name}=... before the command"
        refuse(f"engine.environment.{name}", "...", rule)
    ranks, each = settings.trainer.ranks, engine.processes_per_node
    if ranks != "auto" and ranks % engine.nodes:
        refuse("engine.nodes", engine.nodes, f"must divide trainer.ranks ({ranks}): each node has as many ranks")
    if each and ranks != "auto" and engine.nodes * each != ranks:
        rule = f"must be trainer.ranks ({ranks}) over engine.nodes ({engine.nodes}), or null"
        refuse("engine.processes_per_node", each, rule)
