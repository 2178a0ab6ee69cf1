"""What engines are given, read by their own parsers, which stand in an environment of their own (make test-engines)."""

import json
import os
import subprocess

import pytest
from test_engines import rendered

from stages.files.artifacts import ROOT

PARSERS = ROOT / ".engines/bin/python"
RICH = [
    "engine.nodes=3",
    "engine.gpus_per_node=2",
    "engine.cpus_per_node=8",
    "engine.memory_gigabytes_per_node=64",
    'engine.time_limit="01:00:00:00"',
    "+engine.environment.NOTE=plain",
]

KUBEFLOW = """
import json, sys, yaml
from kubeflow_trainer_api.models import TrainerV1alpha1TrainJob
given = yaml.safe_load(sys.stdin)
print(json.dumps([given, TrainerV1alpha1TrainJob.from_dict(given).to_dict()]))
"""
CORE = """
import sys, yaml, kubernetes_validate
kinds = []
for given in yaml.safe_load_all(sys.stdin):
    kubernetes_validate.validate(given, sys.argv[1], strict=True)
    kinds.append(given["kind"])
print(" ".join(kinds))
"""
SKY = """
import json, sys, yaml, sky
given = yaml.safe_load(sys.stdin)
task = sky.Task.from_yaml_config(dict(given))
(resources,) = task.resources
print(json.dumps([task.name, task.num_nodes, resources.accelerators, task.run, given["run"]]))
"""
# botocore's own check leaves out what a service says of lengths and patterns
SAGEMAKER = r"""
import json, re, sys
from botocore.loaders import Loader
from botocore.model import ServiceModel
from botocore.validate import ParamValidator
given = json.load(sys.stdin)
service = ServiceModel(Loader().load_service_model("sagemaker", "service-2"))
shape = service.operation_model("CreateTrainingJob").input_shape
found = [ParamValidator().validate(given, shape).generate_report()]
def look(value, shape, path):
    bounds, size = shape.metadata, value if isinstance(value, int) else len(value)
    if not bounds.get("min", size) <= size <= bounds.get("max", size):
        found.append(f"{path} is {size}: {bounds}")
    if isinstance(value, str):
        if "pattern" in bounds and not re.fullmatch(bounds["pattern"], value):
            found.append(f"{path} = {value}: {bounds['pattern']}")
        if shape.enum and value not in shape.enum:
            found.append(f"{path} = {value} is none of {shape.enum}")
    if shape.type_name == "structure":
        for name in value:
            look(value[name], shape.members[name], f"{path}.{name}")
    if shape.type_name == "list":
        for inner in value:
            look(inner, shape.member, f"{path}[]")
    if shape.type_name == "map":
        for name, inner in value.items():
            look(name, shape.key, path), look(inner, shape.value, f"{path}.{name}")
look(given, shape, "request")
print(json.dumps([line for line in found if line]))
"""
MOTO = """
import json, sys, boto3, moto
given = json.load(sys.stdin)
with moto.mock_aws():
    service = boto3.client("sagemaker", region_name="eu-west-1")
    service.create_training_job(**given)
    print(json.dumps(service.describe_training_job(TrainingJobName=given["TrainingJobName"]), default=str))
"""


def asked(parser, document, *words):
    """What the parser says of the document."""
    if not PARSERS.exists():
        pytest.skip("the engines' parsers are not installed: make test-engines")
    variables = {"PATH": os.environ["PATH"], "HOME": str(ROOT / ".engines")}
    keys = {"AWS_ACCESS_KEY_ID": "none", "AWS_SECRET_ACCESS_KEY": "none"}  # of nobody: moto asks nobody
    command = [PARSERS, "-c", parser, *words]
    done = subprocess.run(command, input=document, env=variables | keys, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip().splitlines()[-1]


def refused(parser, document, *words):
    with pytest.raises(AssertionError) as error:
        asked(parser, document, *words)
    return str(error.value)


def test_kubeflow_reads_a_train_job_and_drops_no_key_of_it():
    given, read = json.loads(asked(KUBEFLOW, rendered("kubernetes", *RICH)))
    assert read == given
    mistyped = rendered("kubernetes", *RICH).replace("numProcPerNode", "numProcsPerNode")
    given, read = json.loads(asked(KUBEFLOW, mistyped))
    assert read != given, "its models drop what they do not know: the way back finds it"


def test_kubernetes_takes_the_job_and_its_service_under_strict_rules():
    document = rendered("kubernetes", *RICH, "engine.options.kind=Job")
    assert asked(CORE, document, "1.34") == "Service Job"
    assert "completionModes" in refused(CORE, document.replace("completionMode", "completionModes"), "1.34")


def test_skypilot_reads_the_task():
    document = rendered("skypilot", *RICH)
    name, nodes, accelerators, run, given = json.loads(asked(SKY, document))
    assert (name, nodes, accelerators, run) == ("offramp-pretrain-1a2b3c", 3, {"H100": 2}, given)
    assert "acelerators" in refused(SKY, document.replace("accelerators", "acelerators"))


def test_sagemaker_takes_the_request_by_the_rules_of_its_service_and_a_server_keeps_it():
    document = rendered("sagemaker", *RICH[2:])
    assert json.loads(asked(SAGEMAKER, document)) == []
    assert json.loads(asked(SAGEMAKER, document.replace("FullyReplicated", "Everywhere")))
    kept = json.loads(asked(MOTO, document))
    given = json.loads(document)
    assert kept["ResourceConfig"] == given["ResourceConfig"] and kept["ResourceConfig"]["InstanceCount"] == 8
    assert kept["AlgorithmSpecification"]["ContainerArguments"] == given["AlgorithmSpecification"]["ContainerArguments"]
