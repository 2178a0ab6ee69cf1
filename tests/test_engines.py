"""Engines: one launch plan, the document that each makes of it, and a stage that waits for what ranks elsewhere did."""

import hashlib
import json
import os
import shlex
import shutil
import signal
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from benchmarks.checkout import prepared
from chaos.scheduler import stand_in
from stages import config
from stages import pretrain as pretraining
from stages.engines import engine
from stages.engines import plan as planning
from stages.engines.plan import plan_of
from stages.files.artifacts import ROOT, Refusal, write_json
from stages.run.entry import NothingKept, Place
from stages.settings.compose import compose
from stages.settings.engine import NO_ENGINES
from stages.settings.schema import validate
from stages.tracking.record import Run
from stages.training import node
from stages.training.launch import launch

WORDS = sorted(path.stem for path in (ROOT / "conf/engine").glob("*.yaml"))
NEEDED = {  # what a document of no use without it asks for
    "torchrun": ["engine.master_address=10.0.0.1"],
    "kubernetes": ["engine.options.image=registry/offramp:1"],
    "sagemaker": [
        "engine.options.image=123456789012.dkr.ecr.eu-west-1.amazonaws.com/offramp:1",
        "engine.options.role=arn:aws:iam::123456789012:role/offramp",
        "engine.options.storage=s3://mine/offramp",
        "engine.gpus_per_node=1",
    ],
}
JOB = Path("/home/me/offramp/.runs/resume/pretrain-1a2b3c/job.json")
PLACED = [word for word in WORDS if word not in ("local", "torchrun")]  # whose ranks are started elsewhere


VARIABLES = {  # as an engine sets them on its second node
    "JOB_COMPLETION_INDEX": "1",
    "PET_NODE_RANK": "1",
    "PET_MASTER_PORT": "29500",
    "SKYPILOT_NODE_RANK": "1",
}


UNTOLD = os.environ | {"MLFLOW_TRACKING_URI": "http://127.0.0.1:9"}  # nothing listens there


def settings_of(word, *words):
    return validate(compose(["scale=tiny", "corpus=stdlib", f"engine={word}", *NEEDED.get(word, ()), *words]))


def planned(word, *words):
    settings = settings_of(word, *words).engine
    ranks = settings.nodes * (settings.gpus_per_node or 1)
    return plan_of(settings, "pretrain", JOB, Path("/home/me/offramp"), ranks)


def rendered(word, *words):
    return engine(word).render(planned(word, *words))


def node_arguments(document):
    """What the command of a node in this text says to stages/training/node.py."""
    words = document.partition("stages.training.node ")[2].partition("\n")[0]
    for variable, value in VARIABLES.items():
        words = words.replace(f"${variable}", value)
    return node.parser().parse_args(shlex.split(words))


# ---- documents


def test_an_engine_is_a_module_and_a_preset_of_one_name():
    modules = {path.stem for path in (ROOT / "stages/engines").glob("*.py")} - {*NO_ENGINES}
    assert modules == {*WORDS}
    for word in WORDS:
        settings = settings_of(word).engine
        assert settings.name == word
        assert settings.options.keys() == engine(word).Options.model_fields.keys(), "all of them can be typed"
        assert planning.options_of(settings) is not None
        assert word in ("local", "torchrun") or hasattr(engine(word), "run") != hasattr(engine(word), "START")


@pytest.mark.parametrize("word", ["skypilot", "kubernetes"])
def test_a_node_is_started_with_the_same_command_by_every_engine(word):
    for words in ([], *([["engine.options.kind=Job"]] if word == "kubernetes" else [])):
        document = rendered(word, "engine.nodes=3", "engine.gpus_per_node=2", *words)
        asked = node_arguments(document)
        assert document.count("--master-port") == 1
        assert (asked.nodes, asked.processes, asked.master_port, asked.join_seconds) == (3, 2, 29500, 600)
        assert asked.job == Path("/offramp/.runs/resume/pretrain-1a2b3c/job.json")
        assert asked.node_rank == 1


def test_torchrun_reads_what_is_rendered_for_it():
    from torch.distributed.run import get_args_parser

    lines = rendered("torchrun", "engine.nodes=3", "engine.master_port=3000").splitlines()
    asked = []
    for line in [*lines, *rendered("local").splitlines()]:
        python, _, module, *words = shlex.split(line)
        asked.append(get_args_parser().parse_args(words))
        assert (python, module, asked[-1].module) == (sys.executable, "torch.distributed.run", True)
        assert (asked[-1].training_script, asked[-1].training_script_args) == ("stages.training.rank", [str(JOB)])
        assert asked[-1].nproc_per_node == "1"
    *nodes, alone = [(each.nnodes, each.node_rank, each.master_addr, each.master_port) for each in asked]
    assert nodes == [("3", number, "10.0.0.1", 3000) for number in range(3)]
    assert alone[2] == "127.0.0.1"


def test_a_script_for_slurm_asks_for_what_was_set_and_nothing_else(tmp_path):
    words = ["engine.nodes=4", 'engine.time_limit="01:02:03:04"', "engine.gpus_per_node=8", "engine.cpus_per_node=16"]
    words += ["engine.memory_gigabytes_per_node=64", "engine.options.partition=long"]
    words += ["+engine.environment.NOTE=\"it's $HOME\""]
    words += ['engine.options.directives=["--constraint=a100"]', 'engine.options.setup="module load cuda"']
    script = rendered("slurm", *words)
    state = "/home/me/offramp/.runs/resume/pretrain-1a2b3c"
    assert [line.removeprefix("#SBATCH ") for line in script.splitlines() if line.startswith("#SBATCH")] == [
        "--job-name=offramp-pretrain-1a2b3c", "--nodes=4", "--ntasks-per-node=1", "--cpus-per-task=16",
        "--gpus-per-node=8", "--mem=64G", "--time=1-02:03:04", "--partition=long", "--chdir=/home/me/offramp",
        f"--output={state}/slurm.log", "--open-mode=append", "--requeue", "--constraint=a100",
    ]  # fmt: skip
    path = tmp_path / "job.sbatch"
    path.write_text(script)
    subprocess.run(["bash", "-n", path], check=True)
    (export,) = [line for line in script.splitlines() if line.startswith("export")]
    said = subprocess.run(["bash", "-c", f'{export}; printf %s "$NOTE"'], capture_output=True, text=True, check=True)
    assert said.stdout == "it's $HOME", "as it is, and nothing of it run"
    assert script.index("module load cuda") < script.index("srun")
    asks = {line.partition("=")[0] for line in rendered("slurm").splitlines() if line.startswith("#SBATCH")}
    assert not {"#SBATCH --gpus-per-node", "#SBATCH --mem", "#SBATCH --time", "#SBATCH --account"} & asks


def test_a_request_to_sagemaker_keeps_within_what_its_words_may_be():
    request = json.loads(rendered("sagemaker", "engine.gpus_per_node=8", "+engine.environment.LEVEL=high"))
    algorithm = request["AlgorithmSpecification"]
    words = [*algorithm["ContainerEntrypoint"], *algorithm["ContainerArguments"]]
    assert max(map(len, words)) <= 256 and not any("\n" in word for word in words)
    assert request["ResourceConfig"]["InstanceCount"] == 8 and request["Environment"] == {"LEVEL": "high"}
    assert request["StoppingCondition"]["MaxRuntimeInSeconds"] == 24 * 3600
    asked = node.parser().parse_args(["job.json", *algorithm["ContainerArguments"][3:]])
    assert (asked.nodes, asked.processes) == (8, 8)
    with pytest.raises(Refusal, match="^engine.time_limit: SageMaker ends a job after 28 days"):
        rendered("sagemaker", 'engine.time_limit="29:00:00:00"')
    with pytest.raises(Refusal, match="^engine.options.storage = /mnt: must begin with s3://"):
        rendered("sagemaker", "engine.options.storage=/mnt")


def test_the_container_of_sagemaker_finds_its_place_among_the_hosts_and_keeps_its_state_where_s3_takes_it(tmp_path):
    ml, project, state = tmp_path / "ml", tmp_path / "offramp", ".runs/resume/pretrain-1a2b3c"
    (ml / "input/data/project" / state).mkdir(parents=True)
    (ml / "input/data/project" / state / "job.json").write_text("{}")
    (ml / "input/config").mkdir()
    hosts = {"hosts": ["algo-2", "algo-1"], "current_host": "algo-2"}
    (ml / "input/config/resourceconfig.json").write_text(json.dumps(hosts))
    said = tmp_path / "python"
    said.write_text(f'#!/bin/bash\nif [ "$1" = - ]; then exec {sys.executable} "$@"; fi\npwd; printf "%s\\n" "$@"\n')
    said.chmod(0o755)
    words = [ROOT / "stages/engines/sagemaker.sh", project, state, said, "--nodes", "2", "--processes", "8"]
    variables = os.environ | {"ML": str(ml)}
    done = subprocess.run(["bash", *words], env=variables, capture_output=True, text=True, check=True)
    folder, *arguments = done.stdout.splitlines()
    asked = node.parser().parse_args(arguments[2:])
    assert folder == str(project) and (asked.node_rank, asked.master_address) == (1, "algo-1")
    assert asked.job.read_text() == "{}" and asked.job.resolve() == ml / "checkpoints/job.json"


@pytest.mark.parametrize(
    ("word", "words", "reason"),
    [
        ("slurm", ["+engine.options.partitoin=long"], "engine.options.partitoin: no such setting; did you mean"),
        ("slurm", ["engine.options.partition=[a]"], "engine.options.partition = ['a']: must be a word"),
        ("ray", ["+engine.environment.HF_TOKEN=abc"], "engine.environment.HF_TOKEN: has a secret's name"),
        ("kubernetes", ["engine.options.image=null"], "engine.options.image: missing: an image with"),
        ("kubernetes", ["engine.options.kind=Pod"], "engine.options.kind = Pod: must be TrainJob or Job"),
    ],
)
def test_what_no_engine_can_take_is_one_line(word, words, reason):
    with pytest.raises(Refusal) as refusal:
        rendered(word, *words)
    assert str(refusal.value).startswith(reason) and "\n" not in str(refusal.value)


SECRETS = {
    "AWS_SECRET_ACCESS_KEY": "plain/looking+1",
    "HF_TOKEN": "plainlooking-2",
    "MLFLOW_TRACKING_PASSWORD": "plainlooking-3",
}


@pytest.mark.parametrize("word", WORDS)
def test_no_credential_of_the_environment_is_in_a_document_or_in_what_is_left_beside_it(
    place, monkeypatch, capsys, word
):
    for name, value in SECRETS.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "https://me:plainlooking-4@127.0.0.1:9")
    if word in PLACED:
        with pytest.raises(NothingKept):
            launched(place, word, "engine.dry_run=true", "+engine.environment.NOTE=plain")
        written = capsys.readouterr().out
        assert word == "ray" or "NOTE" in written, "what was asked for"
    else:
        written = rendered(word)
    written += "".join(path.read_text() for path in place.root.rglob("*") if path.is_file())
    assert not [value for value in (*SECRETS.values(), "plainlooking-4") if value in written]


@pytest.mark.parametrize(
    ("words", "reason"),
    [
        (["+engine.environment.HF_TOKEN=abc"], "engine.environment.HF_TOKEN: has a secret's name"),
        (["+engine.environment.NOTE='${oc.env:HF_TOKEN}'"], "engine.environment.NOTE: holds a password or token"),
        (['engine.options.setup="export X=hf_abcdefghijklmnopqrs"'], "engine.options.setup: holds a password or token"),
        (['engine.options.setup="git clone https://me:pw@host/x"'], "engine.options.setup: holds a password or token"),
    ],
)
def test_a_credential_that_is_typed_is_refused_before_anything_is_written(tree, monkeypatch, words, reason):
    monkeypatch.setenv("HF_TOKEN", SECRETS["HF_TOKEN"])
    done = pretrain_in(tree, "engine=slurm", *words, "hydra.run.dir=outputs/secret", HF_TOKEN=SECRETS["HF_TOKEN"])
    (line,) = done.stderr.splitlines()
    assert done.returncode == 1 and line.startswith(f"offramp: {reason}")
    assert not (tree / "outputs/secret").exists() and not list(tree.glob(".runs/resume/pretrain-*"))
    with pytest.raises(Refusal, match=f"^{reason}"):
        config.main(["engine=slurm", *words])


@pytest.mark.parametrize(
    ("words", "reason"),
    [
        (["engine=fargate"], "engine = fargate: must be one of kubernetes, local, ray"),
        (["engine.name=fargate"], "engine.name = fargate: must be one of kubernetes, local, ray"),
        (["engine.nodes=2"], "engine.nodes = 2: local is one machine"),
        (["engine=slurm", "engine.nodes=0"], "engine.nodes = 0: must be at least 1"),
        (["engine=torchrun"], "engine.master_address = None: must be the address of node 0"),
        (["engine=torchrun", "engine.master_address=a", "engine.node_rank=2"], "engine.node_rank = 2: must be below"),
        (["engine=slurm", "engine.node_rank=1"], "engine.node_rank = 1: slurm numbers its nodes itself"),
        (["engine=slurm", "trainer.ranks=3"], "engine.nodes = 2: must divide trainer.ranks (3)"),
        (["engine=slurm", "trainer.ranks=4", "engine.processes_per_node=3"], "engine.processes_per_node = 3: must be"),
        (["+engine.environment.HF_TOKEN=abc"], "engine.environment.HF_TOKEN = ...: local does not read it"),
        (["engine.environment={A: b}"], "engine.environment: it has no key of that name yet: add one with +engine."),
    ],
)
def test_impossible_numbers_are_one_line(words, reason):
    with pytest.raises(Refusal) as refusal:
        validate(compose(words))
    assert str(refusal.value).startswith(reason) and "\n" not in str(refusal.value)


def test_ranks_are_shared_out_over_the_nodes_and_one_more_node_adds_none_on_cpus():
    assert [planning.rank_count("auto", nodes, None, 0) for nodes in (1, 2, 3)] == [2, 2, 3]
    assert planning.rank_count("auto", 2, None, 8) == 16
    assert planning.rank_count(4, 2, None, 8) == 4
    assert planning.rank_count("auto", 2, 3, 8) == 6


# ---- a stage and the ranks elsewhere


@pytest.fixture
def place(tmp_path):
    """A project whose data nobody will look into."""
    (tmp_path / "artifacts/data").mkdir(parents=True)
    (tmp_path / "artifacts/data/card.json").write_text("{}")
    return Place(tmp_path, tmp_path / "out")


def launched(place, *words):
    return launch(pretraining.fits, settings_of(*words), place, ["artifacts/data"], Run())


@pytest.mark.parametrize("word", PLACED)
def test_a_dry_run_prints_a_document_alone_and_the_job_that_it_names_is_there(place, capsys, word):
    with pytest.raises(NothingKept, match="^pretrain: engine.dry_run: .* nothing was started$"):
        launched(place, word, "engine.dry_run=true")
    (job,) = place.root.glob(".runs/resume/pretrain-*/job.json")
    document = capsys.readouterr().out
    assert job.parent.name in document and not place.out.exists()
    if word in ("kubernetes", "skypilot"):
        assert list(yaml.safe_load_all(document))
    with pytest.raises(NothingKept):
        launched(place, word, "engine.dry_run=true")
    assert capsys.readouterr().out == document, "the same each time"


def test_an_engine_that_is_only_rendered_says_what_to_do_and_takes_the_result_that_was_brought_home(place):
    with pytest.raises(Refusal, match="^skypilot is not started from here: add engine.dry_run=true .*sky launch"):
        launched(place, "skypilot")
    (job,) = place.root.glob(".runs/resume/pretrain-*/job.json")
    result = {"teacher": {"seconds": 1.0, "validation_bits_per_byte": 2.5, "moved": None}}
    found = {"accelerator": "2 x H100", "ranks": 2, "precision": "bf16-mixed"}
    write_json(job.parent / "result.json", result)
    write_json(job.parent / "conditions.json", found)
    write_json(job.parent / "outs/artifacts/teacher/config.json", {"of": "there"})
    assert launched(place, "skypilot") == (result, found)
    assert json.loads((place.out / "artifacts/teacher/config.json").read_text()) == {"of": "there"}
    assert json.loads((place.out / "measurements/pretrain.json").read_text())["accelerator"] == "gpu"


@pytest.mark.parametrize(
    ("word", "reason"),
    [
        ("slurm", "sbatch is not installed here: run this on a login node"),
        ("ray", "ray is not installed: .venv/bin/pip install -c constraints.txt -e '.\\[ray\\]'"),
    ],
)
def test_an_engine_that_is_not_installed_is_one_line(place, monkeypatch, capsys, word, reason):
    monkeypatch.setenv("PATH", str(place.root))
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(Refusal, match=f"^{reason}"):
        launched(place, word)
    assert not capsys.readouterr().out, "nothing has started"


@pytest.fixture(scope="module")
def tree(tmp_path_factory):
    """A copy of the project at scale tiny, with its data."""
    return prepared(tmp_path_factory.mktemp("tree") / "project", "tiny")


def pretrain_in(folder, *words, before=(), **variables):
    """Two steps of the teacher."""
    command = [*before, sys.executable, "-m", "stages.pretrain", "pretrain.steps=2", "trainer.accelerator=cpu", *words]
    return subprocess.run(command, cwd=folder, env=UNTOLD | variables, capture_output=True, text=True)


ONE_CORE = ["taskset", "-c", str(min(os.sched_getaffinity(0)))] if hasattr(os, "sched_getaffinity") else []
BY_CORE = pytest.mark.skipif(shutil.which("taskset") is None, reason="gives each rank one core by taskset")


@pytest.fixture(scope="module")
def bytes_of_one_machine(tree):
    """Of the model of two ranks with a thread each."""
    done = pretrain_in(tree, "engine=local", "hydra.run.dir=outputs/local", before=ONE_CORE)
    assert done.returncode == 0, done.stderr
    return (tree / "outputs/local/artifacts/teacher/model.safetensors").read_bytes()


MINE = """
from stages.settings.bounds import Section, Word

START = "mine"

class Options(Section):
    queue: Word

def render(plan):
    return f"{plan.nodes} nodes in {plan.options.queue} for {plan.job}\\n"
"""


def test_an_engine_is_added_by_one_module_and_its_preset(tree):
    (tree / "stages/engines/mine.py").write_text(MINE)
    (tree / "conf/engine/mine.yaml").write_text("# @package engine\nname: mine\nnodes: 2\noptions: {queue: fast}\n")
    done = pretrain_in(tree, "engine=mine", "engine.dry_run=true")
    assert done.returncode == 0, done.stderr
    (job,) = tree.glob(".runs/resume/pretrain-*/job.json")
    assert done.stdout == f"2 nodes in fast for {job}\n"
    assert "nothing was started" in done.stderr and not list(tree.glob(".runs/tracking/*pretrain*"))
    shutil.rmtree(job.parent)


@BY_CORE
def test_a_job_of_slurm_trains_on_two_nodes_and_gives_the_bytes_of_one_machine(tree, tmp_path, bytes_of_one_machine):
    """sbatch, srun and scontrol stand in; what they start is the real script. make test-slurm has the real ones."""
    path = stand_in(tmp_path)
    with socket.create_server(("127.0.0.1", 0)) as probe:
        port = probe.getsockname()[1]
        words = ["engine=slurm", f"engine.master_port={port}", "hydra.run.dir=outputs/here"]
        taken = pretrain_in(tree, *words, PATH=path)
    refused = f"offramp: node 0 cannot listen on 127.0.0.1:{port} (Address already in use): choose another engine."
    assert taken.returncode == 1 and refused in taken.stderr and "Traceback" not in taken.stderr
    done = pretrain_in(tree, *words, PATH=path)
    assert done.returncode == 0, done.stderr
    assert "job 7 of SLURM, for 2 nodes" in done.stdout and "teacher: step 2/2" in done.stdout, "shown while it trains"
    assert (tree / "outputs/here/artifacts/teacher/model.safetensors").read_bytes() == bytes_of_one_machine
    assert json.loads((tree / "outputs/here/measurements/pretrain.json").read_text())["ranks"] == 2
    assert not list(tree.glob(".runs/resume/pretrain-*/job.json")), "the outs are the state now"


CROWDED = """#!/bin/bash
echo $$ > {pid}
echo 'sbatch: error: Slurm temporarily unable to accept job, sleeping and retrying' >&2
exec sleep 600
"""


def test_ctrl_c_while_sbatch_waits_for_room_leaves_no_job_behind(tree, tmp_path):
    (tmp_path / "sbatch").write_text(CROWDED.format(pid=tmp_path / "pid"))
    (tmp_path / "sbatch").chmod(0o755)
    command = [sys.executable, "-m", "stages.pretrain", "engine=slurm", "hydra.run.dir=outputs/crowded"]
    theirs, pipe = UNTOLD | {"PATH": f"{tmp_path}:{os.environ['PATH']}"}, subprocess.PIPE
    stage = subprocess.Popen(command, cwd=tree, env=theirs, stdout=pipe, stderr=pipe, text=True)
    assert any("sleeping and retrying" in line for line in stage.stdout), "shown while it waits"
    stage.send_signal(signal.SIGINT)
    told = stage.communicate(timeout=120)[1]
    assert stage.returncode == 130 and "offramp: interrupted; the same command continues" in told, told
    assert not Path(f"/proc/{(tmp_path / 'pid').read_text().strip()}").exists()


@BY_CORE
def test_ray_trains_on_two_workers_and_gives_the_bytes_of_one_machine(tree, bytes_of_one_machine):
    pytest.importorskip("ray", reason="the extra ray is not installed: make test-engines")
    done = pretrain_in(tree, "engine=ray", "hydra.run.dir=outputs/ray", before=ONE_CORE)
    assert done.returncode == 0, done.stderr
    assert (tree / "outputs/ray/artifacts/teacher/model.safetensors").read_bytes() == bytes_of_one_machine


# ---- where nodes meet


def test_a_node_that_waits_in_vain_and_a_port_that_is_taken_are_one_line():
    from stages.training.nodes import Nodes
    from stages.training.rendezvous import meet

    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = listener.getsockname()[1]
        with pytest.raises(Refusal, match=f"^node 0 cannot listen on 127.0.0.1:{port} .*another engine.master_port"):
            meet(Nodes(2, 0, "127.0.0.1", port, 0.3))
        with pytest.raises(Refusal, match=f"^no node 0 answers on 127.0.0.1:{port}"):  # what answers is no store
            meet(Nodes(2, 1, "127.0.0.1", port, 0.3))
    with pytest.raises(Refusal, match=f"^node 0 cannot listen on 192.0.2.1:{port} .*: engine.master_address is to be"):
        meet(Nodes(2, 0, "192.0.2.1", port, 0.3))
    with pytest.raises(Refusal, match=f"^no node 0 answers on 127.0.0.1:{port}: start it with"):
        meet(Nodes(2, 1, "127.0.0.1", port, 0.3))
    with pytest.raises(Refusal, match=f"^not all 2 nodes have come to 127.0.0.1:{port}: start the same command on"):
        meet(Nodes(2, 0, "127.0.0.1", port, 0.3))


def test_the_address_of_a_node_is_a_number_on_an_interface_of_its_own():
    from stages.training.nodes import Nodes

    loopback = Nodes(2, 0, "localhost", 29500).resolved()
    assert loopback.address == "127.0.0.1"
    if sys.platform == "linux":
        assert loopback.network_environment() == {"GLOO_SOCKET_IFNAME": "lo", "NCCL_SOCKET_IFNAME": "lo"}
    with pytest.raises(Refusal, match="^nowhere.invalid: no such host here"):
        Nodes(2, 1, "nowhere.invalid", 29500).resolved()


SHARE = """
import json, os, sys, torch, torch.distributed as dist
from pathlib import Path
from types import SimpleNamespace
from stages.files.artifacts import Refusal
from stages.training.sharing import share_work
rank, folder, store = int(sys.argv[1]), Path(sys.argv[2]), sys.argv[3]
dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=2)
os.environ["LOCAL_RANK"] = "0"
told = []
for other in ("pretrain-1a", "pretrain-2b" if rank else "pretrain-1a"):
    work = SimpleNamespace(state=folder.with_name(other + ("-node1" if rank else "")))
    work.state.mkdir(exist_ok=True)
    try:
        share_work(work, torch.device("cpu"))
    except Refusal as refusal:
        told.append(str(refusal))
print(json.dumps(told))
"""


def saved(folder, name, step, content):
    (folder / f"{name}-{step}.pt").write_bytes(content)
    index = {"file": f"{name}-{step}.pt", "sha256": hashlib.sha256(content).hexdigest(), "step": step}
    write_json(folder / f"{name}.json", index)


def test_machines_with_a_folder_each_go_on_from_what_node_0_has_saved_and_other_work_is_refused_on_both(tmp_path):
    ours, theirs = tmp_path / "pretrain-1a", tmp_path / "pretrain-1a-node1"
    for folder in (ours, theirs):
        folder.mkdir()
    content, unknown = os.urandom(1000), b"of a run that node 0 knows nothing of"
    saved(ours, "teacher", 5, content)
    saved(theirs, "student", 9, unknown)
    for folder in (ours, theirs):
        saved(folder, "control", 7, content)
    (theirs / "control-7.pt").write_bytes(content[:500])  # it came by half
    write_json(theirs / "job.json", {"stage": "pretrain"})
    run = [sys.executable, "-c", SHARE]
    ranks = [
        subprocess.Popen([*run, str(rank), tmp_path / "any", tmp_path / "store"], cwd=ROOT, stdout=subprocess.PIPE)
        for rank in (0, 1)
    ]
    told = [json.loads(rank.communicate(timeout=120)[0]) for rank in ranks]
    assert told[0] == told[1] and len(told[0]) == 1
    assert told[0][0].startswith("the nodes do not have the same code, settings, data or kind of machine")
    assert (theirs / "teacher-5.pt").read_bytes() == (theirs / "control-7.pt").read_bytes() == content
    assert json.loads((theirs / "teacher.json").read_text())["step"] == 5
    assert not (theirs / "student.json").exists() and (theirs / "job.json").exists()
    kept = ["control-7.pt", "control.json", "teacher-5.pt", "teacher.json"]
    assert sorted(path.name for path in ours.iterdir()) == kept
