"""SageMaker: the request CreateTrainingJob as JSON. Rendered only: it needs an account there.

Each instance runs torchrun itself, which is what the SDK's `torch_distributed` starts; `smdistributed.dataparallel` is
refused for every current PyTorch. The project's folder comes from S3 as a channel; sagemaker.sh, which stands beside
this module and so in that channel, makes its state folder the one whose content SageMaker copies to S3.
"""

import json
from typing import Any

from stages.engines.plan import LaunchPlan, node_options, required
from stages.files.artifacts import Refusal
from stages.settings.bounds import Count, Section, Word

START = "aws sagemaker create-training-job --cli-input-json file://job.json"
SCRIPT = "/opt/ml/input/data/project/stages/engines/sagemaker.sh"
DAY_SECONDS = 24 * 3600
LONGEST_DAYS = 28


class Options(Section):
    instance_type: Word = "ml.p4d.24xlarge"
    image: Word | None = None
    role: Word | None = None
    storage: Word | None = None
    volume_gigabytes: Count = 500


def render(plan: LaunchPlan) -> str:
    own = plan.options
    image = required("image", own.image, "an image in ECR with Python, torch and this project's packages")
    role = required("role", own.role, "the ARN of the execution role")
    storage = required("storage", own.storage, "s3://... below which project/ holds the project's folder").rstrip("/")
    if not storage.startswith("s3://"):
        raise Refusal(f"engine.options.storage = {storage}: must begin with s3://")
    limit = plan.time_limit_seconds or DAY_SECONDS
    if limit > LONGEST_DAYS * DAY_SECONDS:
        raise Refusal(f"engine.time_limit: SageMaker ends a job after {LONGEST_DAYS} days: set {LONGEST_DAYS}:00:00:00")
    source = {"S3DataType": "S3Prefix", "S3Uri": f"{storage}/project", "S3DataDistributionType": "FullyReplicated"}
    state = plan.state.removeprefix(plan.project).lstrip("/")
    request: dict[str, Any] = {
        "TrainingJobName": plan.name,
        "RoleArn": role,
        "AlgorithmSpecification": {
            "TrainingImage": image,
            "TrainingInputMode": "File",
            "ContainerEntrypoint": ["bash", SCRIPT],
            "ContainerArguments": [plan.project, state, plan.python, *node_options(plan)],
        },
        "InputDataConfig": [{"ChannelName": "project", "DataSource": {"S3DataSource": source}}],
        "OutputDataConfig": {"S3OutputPath": f"{storage}/outs"},
        "CheckpointConfig": {"S3Uri": f"{storage}/states/{plan.name}"},
        "ResourceConfig": {
            "InstanceType": own.instance_type,
            "InstanceCount": plan.nodes,
            "VolumeSizeInGB": own.volume_gigabytes,
        },
        "StoppingCondition": {"MaxRuntimeInSeconds": limit},
    }
    if plan.environment:
        request["Environment"] = plan.environment
    return json.dumps(request, indent=1) + "\n"
