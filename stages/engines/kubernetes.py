"""Kubernetes: Kubeflow Trainer's TrainJob, or a plain indexed Job with a headless service. Rendered only."""

import shlex
from typing import Any, Literal

import yaml

from stages.engines.plan import LaunchPlan, node_command, required
from stages.settings.bounds import Section, Word

START = "kubectl create -f job.yaml"
VOLUME = "project"
GRACE_SECONDS = 120  # for the ranks to save their state after SIGTERM


class Options(Section):
    kind: Literal["TrainJob", "Job"] = "TrainJob"
    namespace: Word = "default"
    image: Word | None = None
    claim: Word = "offramp"
    runtime: Word = "torch-distributed"
    gpu_resource: Word = "nvidia.com/gpu"


def render(plan: LaunchPlan) -> str:
    """One object of kind TrainJob, or a Service and a Job."""
    required("image", plan.options.image, "an image with Python, torch and this project's packages")
    objects = [_train_job(plan)] if plan.options.kind == "TrainJob" else [_service(plan), _job(plan)]
    return yaml.safe_dump_all(objects, sort_keys=False, width=1000)


def _train_job(plan):
    """The runtime `torch-distributed` sets PET_NODE_RANK, PET_MASTER_ADDR and PET_MASTER_PORT in each pod."""
    agent = node_command(plan, '"$PET_NODE_RANK"', '"$PET_MASTER_ADDR"', '"$PET_MASTER_PORT"')
    mount = {"name": VOLUME, "mountPath": plan.project}
    pod = {
        "terminationGracePeriodSeconds": GRACE_SECONDS,
        "volumes": [_volume(plan)],
        "containers": [{"name": "node", "volumeMounts": [mount]}],
    }
    job: dict[str, Any] = {"name": "node", "template": {"spec": {"template": {"spec": pod}}}}
    patch = {
        "manager": "offramp/render",
        "trainingRuntimeSpec": {"template": {"spec": {"replicatedJobs": [job]}}},
    }
    trainer: dict[str, Any] = {
        "image": plan.options.image,
        "command": _shell(plan, agent),
        "numNodes": plan.nodes,
        "numProcPerNode": plan.processes_per_node,
        "resourcesPerNode": _resources(plan),
    }
    if plan.environment:
        trainer["env"] = _variables(plan)
    spec: dict[str, Any] = {"runtimeRef": {"name": plan.options.runtime}, "trainer": trainer, "runtimePatches": [patch]}
    if plan.time_limit_seconds:
        spec["activeDeadlineSeconds"] = plan.time_limit_seconds
    return {"apiVersion": "trainer.kubeflow.org/v1alpha1", "kind": "TrainJob", "metadata": _named(plan), "spec": spec}


def _service(plan):
    """So that pod 0 has a name that the others find."""
    spec = {"clusterIP": "None", "publishNotReadyAddresses": True, "selector": {"job-name": plan.name}}
    return {"apiVersion": "v1", "kind": "Service", "metadata": _named(plan), "spec": spec}


def _job(plan):
    agent = node_command(plan, '"$JOB_COMPLETION_INDEX"', f"{plan.name}-0.{plan.name}")
    container: dict[str, Any] = {
        "name": "node",
        "image": plan.options.image,
        "command": _shell(plan, agent),
        "resources": _resources(plan),
        "volumeMounts": [{"name": VOLUME, "mountPath": plan.project}],
    }
    if plan.environment:
        container["env"] = _variables(plan)
    pod = {
        "subdomain": plan.name,
        "restartPolicy": "OnFailure",
        "terminationGracePeriodSeconds": GRACE_SECONDS,
        "containers": [container],
        "volumes": [_volume(plan)],
    }
    spec: dict[str, Any] = {
        "completionMode": "Indexed",
        "completions": plan.nodes,
        "parallelism": plan.nodes,
        "backoffLimit": 6,
        "template": {"spec": pod},
    }
    if plan.time_limit_seconds:
        spec["activeDeadlineSeconds"] = plan.time_limit_seconds
    return {"apiVersion": "batch/v1", "kind": "Job", "metadata": _named(plan), "spec": spec}


def _named(plan):
    return {"name": plan.name, "namespace": plan.options.namespace}


def _shell(plan, agent):
    return ["bash", "-c", f"cd {shlex.quote(plan.project)} && exec {agent}"]


def _variables(plan):
    return [{"name": name, "value": value} for name, value in sorted(plan.environment.items())]


def _volume(plan):
    return {"name": VOLUME, "persistentVolumeClaim": {"claimName": plan.options.claim}}


def _resources(plan):
    wanted = {
        "cpu": plan.cpus_per_node and str(plan.cpus_per_node),
        "memory": plan.memory_gigabytes_per_node and f"{plan.memory_gigabytes_per_node}G",
        plan.options.gpu_resource: str(plan.gpus_per_node) if plan.gpus_per_node else None,
    }
    wanted = {name: value for name, value in wanted.items() if value}
    return {"requests": wanted, "limits": dict(wanted)}
