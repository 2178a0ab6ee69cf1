"""SkyPilot: a task for any of its clouds, for Kubernetes or for SLURM. Rendered only: it needs an account there."""

import shlex
from typing import Any

import yaml

from stages.engines.plan import LaunchPlan, node_command
from stages.settings.bounds import Section, Word

START = "sky launch task.yaml"
NODE_RANK = '"$SKYPILOT_NODE_RANK"'
FIRST_IP = '"$(echo "$SKYPILOT_NODE_IPS" | head -n 1)"'


class Options(Section):
    gpu: Word = "H100"
    infra: Word | None = None
    spot: bool = False
    image: Word | None = None
    storage: Word | None = None
    setup: Word | None = None


class _Readable(yaml.SafeDumper):
    """Lines of shell as lines."""


_Readable.add_representer(
    str, lambda dumper, text: dumper.represent_scalar("tag:yaml.org,2002:str", text, "|" if "\n" in text else None)
)


def render(plan: LaunchPlan) -> str:
    """The task as YAML."""
    own = plan.options
    resources: dict[str, Any] = {
        "infra": own.infra,
        "accelerators": f"{own.gpu}:{plan.gpus_per_node}" if plan.gpus_per_node else None,
        "cpus": plan.cpus_per_node and f"{plan.cpus_per_node}+",
        "memory": plan.memory_gigabytes_per_node and f"{plan.memory_gigabytes_per_node}+",
        "use_spot": own.spot,
        "image_id": own.image,
    }
    inside = f"cd {shlex.quote(plan.project)}"
    limit = f"timeout --signal=TERM {plan.time_limit_seconds} " if plan.time_limit_seconds else ""
    task: dict[str, Any] = {
        "name": plan.name,
        "num_nodes": plan.nodes,
        "resources": {name: value for name, value in resources.items() if value is not None},
        "envs": plan.environment or None,
        "file_mounts": {plan.project: {"source": own.storage, "mode": "MOUNT"}} if own.storage else None,
        "setup": own.setup and f"{inside}\n{own.setup}\n",
        "run": f'{inside}\n{limit}{node_command(plan, NODE_RANK, FIRST_IP)}\n',
    }
    task = {name: value for name, value in task.items() if value is not None}
    return yaml.dump(task, Dumper=_Readable, sort_keys=False, width=1000)
