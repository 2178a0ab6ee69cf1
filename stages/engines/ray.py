"""Ray Train: a worker on each node, which is that node's agent. The extra `ray`."""

import json
import os
import shlex
import signal
from collections.abc import Callable
from typing import Any

from stages.engines.plan import LaunchPlan, node_words
from stages.files.extras import extra
from stages.settings.bounds import Section, Word


class Options(Section):
    address: Word | None = None


def render(plan: LaunchPlan) -> str:
    """The scaling of the trainer and what its workers run, as JSON: Ray has no document of its own for that."""
    agent = shlex.join(node_words(plan, "RANK", "MASTER_ADDR", "MASTER_PORT"))
    return json.dumps({"address": plan.options.address, "scaling": scaling(plan), "worker": agent}, indent=1) + "\n"


def scaling(plan: LaunchPlan) -> dict[str, Any]:
    """The arguments of ray.train.ScalingConfig: a worker is a node of the plan, however many GPUs it has."""
    resources: dict[str, float] = {"CPU": plan.cpus_per_node or 1}
    resources |= {"GPU": plan.gpus_per_node} if plan.gpus_per_node else {}
    resources |= {"memory": plan.memory_gigabytes_per_node * 1e9} if plan.memory_gigabytes_per_node else {}
    strategy = "STRICT_SPREAD" if plan.gpus_per_node else "PACK"
    return {
        "num_workers": plan.nodes,
        "use_gpu": plan.gpus_per_node > 0,
        "resources_per_worker": resources,
        "placement_strategy": strategy,
    }


def run(plan: LaunchPlan, told: Callable[[str], None]) -> str:
    ray, train, parallel = extra("ray", "ray", "ray.train", "ray.train.v2.api.data_parallel_trainer")
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")  # it would tell its makers
    runtime = {"env_vars": plan.environment | {"PYTHONPATH": plan.project}}
    if plan.options.address:
        ray.init(address=plan.options.address, runtime_env=runtime, logging_level="ERROR")
    else:  # a cluster of this machine, for as long as this process lives
        here = {"include_dashboard": False, "_node_ip_address": "127.0.0.1"}
        ray.init(runtime_env=runtime, logging_level="ERROR", **here)
    before = signal.signal(signal.SIGTERM, signal.default_int_handler)  # so that the cluster ends, and its ranks save
    trainer = parallel.DataParallelTrainer(
        node_of,
        train_loop_config={"words": node_words(plan, "RANK", "MASTER_ADDR", "MASTER_PORT"), "project": plan.project},
        scaling_config=train.ScalingConfig(**scaling(plan)),
        run_config=train.RunConfig(name=plan.name, storage_path=f"{plan.state}/ray"),
    )
    told(f"Ray Train starts {plan.nodes} workers, each with {plan.processes_per_node} of the ranks")
    try:
        trainer.fit()
    except Exception as error:  # whatever Ray makes of the end of a worker
        return f"Ray Train ended: {' '.join(str(error).split())[-300:]}"
    finally:
        signal.signal(signal.SIGTERM, before)
        ray.shutdown()
    return ""


def node_of(job: dict[str, Any]) -> None:
    """In a worker of Ray: the agent of one node, at an address that worker 0 found free."""
    import socket
    import subprocess

    import ray.train
    import ray.util
    from ray.train.collective import broadcast_from_rank_zero

    address = ray.util.get_node_ip_address()
    with socket.create_server((address, 0)) as probe:
        here = {"MASTER_ADDR": address, "MASTER_PORT": str(probe.getsockname()[1])}
    meeting = broadcast_from_rank_zero(here) | {"RANK": str(ray.train.get_context().get_world_rank())}
    words = [meeting.get(word, word) for word in job["words"]]
    code = subprocess.run(words, cwd=job["project"]).returncode
    if code:
        raise RuntimeError(f"the agent of node {meeting['RANK']} ended with code {code}")
