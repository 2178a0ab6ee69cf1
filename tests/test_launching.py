"""The ranks of a real, tiny training run: how they are started, whom they listen to, and what a killed one leaves."""

import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest

from stages import pretrain as pretraining
from stages.files.artifacts import ROOT, Refusal, sha256_of
from stages.run.entry import Place
from stages.training import environment as variables
from stages.training import launch as launching
from stages.training.job import Job, name_of
from stages.training.launch import launch
from stages.training.launchers.torchrun import Line

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
LOOPBACK = {"0100007F", "00000000000000000000000001000000", "0000000000000000FFFF00000100007F"}  # of /proc/net


@pytest.fixture(scope="module")
def tree(tmp_path_factory):
    """A copy of the code at `scale: tiny`, with its data and more steps than any test waits for."""
    tree = tmp_path_factory.mktemp("tree")
    for name in ("stages", "conf"):
        shutil.copytree(ROOT / name, tree / name, ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copy(ROOT / "dvc.yaml", tree)
    sheet = (ROOT / "params.yaml").read_text()
    (tree / "params.yaml").write_text(sheet.replace("scale: demo", "scale: tiny"))
    tiny = tree / "conf/scale/tiny.yaml"
    tiny.write_text(tiny.read_text().replace("pretrain: {steps: 20,", "pretrain: {steps: 100000,"))
    for stage in ("config", "prepare"):
        subprocess.run([sys.executable, "-m", f"stages.{stage}"], cwd=tree, env=environment(stage), check=True)
    return tree


def environment(stage):
    return os.environ | {"DVC_STAGE": stage, "MLFLOW_TRACKING_URI": "http://127.0.0.1:9"}  # nothing listens there


def pretrain(tree, seconds, sought):
    """A stage that trains, from the moment when `sought` finds something; and what it found."""
    command = [sys.executable, "-m", "stages.pretrain"]
    stage = subprocess.Popen(command, cwd=tree, env=environment("pretrain"), stderr=subprocess.PIPE, text=True)
    deadline = time.monotonic() + seconds
    while not (found := sought(stage)):
        assert stage.poll() is None, stage.stderr.read()
        assert time.monotonic() < deadline
        time.sleep(0.01)
    return stage, found


@pytest.fixture
def training(tree):
    """A stage that trains, from its first logged step on."""
    shutil.rmtree(tree / ".runs/resume", ignore_errors=True)
    stage, _ = pretrain(tree, 120, lambda _: list((tree / ".runs/resume").glob("pretrain-*/steps.jsonl")))
    yield stage
    if stage.poll() is None:
        stage.terminate()
    stage.communicate(timeout=60)


@pytest.fixture
def starting(tree):
    """A stage that trains, while its torchrun still imports torch; and that torchrun."""
    torchrun = "stages.training.launchers.torchrun"
    stage, found = pretrain(
        tree, 60, lambda stage: [pid for pid, words in descendants(stage.pid).items() if torchrun in words]
    )
    yield stage, found[0]
    stage.kill()
    stage.communicate()


def descendants(root):
    """The process and all below it: pid -> command."""
    children = {}
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            parent = int(stat.read_text().rsplit(")", 1)[1].split()[1])
            command = (stat.parent / "cmdline").read_bytes().replace(b"\0", b" ").decode()
        except OSError:  # it ended meanwhile
            continue
        children.setdefault(parent, []).append((int(stat.parent.name), command))
    found, waiting = {}, [(root, "")]
    while waiting:
        pid, command = waiting.pop()
        found[pid] = command
        waiting += children.get(pid, [])
    return found


def listening_addresses(pids):
    """Local addresses, in the hexadecimal of /proc/net, on which these processes take connections."""
    own = set()
    for pid in pids:
        for entry in Path(f"/proc/{pid}/fd").iterdir():
            target = os.readlink(entry)
            if target.startswith("socket:["):
                own.add(target[8:-1])
    addresses = set()
    for table in ("tcp", "tcp6"):
        for line in Path(f"/proc/net/{table}").read_text().splitlines()[1:]:
            words = line.split()
            if words[3] == "0A" and words[9] in own:  # 0A: LISTEN
                addresses.add(words[1])
    return addresses


@pytest.mark.parametrize("rank", [0, 1])
def test_ranks_listen_on_loopback_only_and_a_killed_one_ends_the_stage_in_one_line_with_no_orphan(training, rank):
    below = descendants(training.pid)
    addresses = listening_addresses(below)
    assert len(addresses) >= 3, "the store and two ranks"
    assert {address.split(":")[0] for address in addresses} <= LOOPBACK

    (victim,) = [pid for pid in below if f"LOCAL_RANK={rank}".encode() in Path(f"/proc/{pid}/environ").read_bytes()]
    os.kill(victim, signal.SIGKILL)
    assert training.wait(60) == 1
    told = training.stderr.read().splitlines()  # the mirror adds that no MLflow server is there
    assert "Traceback" not in "".join(told)
    wanted = f"offramp: rank {rank} was killed by SIGKILL, perhaps for lack of memory; the same command"
    assert any(line.startswith(wanted) for line in told)
    assert not [pid for pid, words in below.items() if alive(pid) and "stages.tracking" not in words]  # which goes on


def alive(pid):
    status = Path(f"/proc/{pid}/status")  # a dead process may wait there as a zombie for a lazy init
    return status.exists() and "State:\tZ" not in status.read_text()


# self.log under Lightning, with the class that stands in for torchmetrics
SELF_LOG = """
import json, lightning, torch
class Module(lightning.LightningModule):
    def __init__(self):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.ones(()))
    def training_step(self, number, _):
        for word in ("mean", "max", "min", "sum"):
            self.log(word, number, on_step=True, on_epoch=True, reduce_fx=word, batch_size=1)
        self.log("step", number)
        return self.weight * number
    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), 0.1)
off = dict.fromkeys(("logger", "enable_checkpointing", "enable_progress_bar", "enable_model_summary"), False)
trainer = lightning.Trainer(max_epochs=2, accelerator="cpu", **off)
trainer.fit(Module(), torch.utils.data.DataLoader([torch.tensor(x) for x in (1.0, 5.0, 3.0)], batch_size=None))
found = trainer.callback_metrics
print(json.dumps({word: found[word].item() for word in ("mean", "max", "min", "sum", "step")}))
"""


def test_a_rank_does_not_import_what_lightning_wants_and_training_does_not():
    unwanted = {"scipy", "matplotlib", "transformers", "mlflow"}
    code = f"import stages.training.rank, sys\n{SELF_LOG}\nprint({unwanted} & set(sys.modules))"
    imported = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    logged, found = imported.stdout.strip().splitlines()[-2:]
    assert found == "set()"
    assert json.loads(logged) == {"mean": 3, "max": 5, "min": 1, "sum": 9, "step": 3}, "what self.log makes of 1, 5, 3"


def test_a_missing_input_is_named_before_a_rank_starts(tiny_settings, tmp_path):
    with pytest.raises(Refusal, match="^artifacts/data is missing: run the stage that writes it"):
        launch(pretraining.fits, tiny_settings, Place(tmp_path, tmp_path), ["artifacts/data"], run=None)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_training_stage_told_to_stop_before_its_ranks_are_there_says_so_at_once(starting, number):
    stage, torchrun = starting
    for pid in (torchrun, stage.pid):  # a terminal tells both
        os.kill(pid, number)
    told = stage.communicate(timeout=60)[1]
    assert stage.returncode == 130
    assert "interrupted; the same command continues" in told and "Traceback" not in told
    assert not alive(torchrun)


def test_a_torchrun_killed_before_its_ranks_are_there_is_told_in_one_line(starting):
    stage, torchrun = starting
    os.kill(torchrun, signal.SIGKILL)
    told = stage.communicate(timeout=60)[1]
    assert stage.returncode == 1
    assert "offramp: torchrun ended with code -9 before it could start a rank" in told and "Traceback" not in told


def test_a_message_that_torchrun_did_not_read_is_not_sent_again_when_the_line_is_closed():
    ours, theirs = socket.socketpair()
    theirs.close()
    line = Line(ours)
    with pytest.raises(BrokenPipeError):
        line.send({"ranks": 2})
    line.close()


ALONE = """
import os, subprocess, sys
from stages.training.environment import agent_environment
from stages.training.machine import conditions

class Launcher:
    "One rank, without torchrun."

    def __enter__(self):
        return self

    def __exit__(self, *error):
        pass

    def conditions(self, trainer):
        return conditions(trainer | {"ranks": 1})

    def run(self, job):
        rank = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29511"}
        command = [sys.executable, "-m", "stages.training.rank", str(job)]
        return subprocess.run(command, env=agent_environment() | rank).returncode
"""
ONE_DEVICE = """
from lightning.pytorch.strategies import SingleDeviceStrategy

def lightning_strategy():
    print("one device, no DDP")
    return SingleDeviceStrategy("cpu")

def needs_rehearsal(world_size):
    return False
"""


def by_hand(tree, *words):
    theirs = {name: value for name, value in environment("").items() if name != "DVC_STAGE"}
    words = ("trainer.accelerator=cpu", *words)
    command = [sys.executable, "-m", "stages.pretrain", *words]
    return subprocess.run(command, cwd=tree, env=theirs, capture_output=True, text=True)


def test_a_launcher_and_a_strategy_are_added_with_a_file_and_chosen_by_its_name(tree):
    (tree / "stages/training/launchers/alone.py").write_text(ALONE)
    (tree / "stages/training/strategies/one_device.py").write_text(ONE_DEVICE)
    words = ("trainer.launcher=alone", "trainer.strategy=one_device", "hydra.run.dir=outputs/tried")
    done = by_hand(tree, "pretrain.steps=2", *words)
    assert done.returncode == 0, done.stderr
    assert "1 rank, 2 steps" in done.stdout and "one device, no DDP" in done.stdout
    assert (tree / "outputs/tried/artifacts/teacher/model.safetensors").exists()


@pytest.mark.parametrize(("key", "words"), [("launcher", "torchrun"), ("strategy", "ddp, fsdp2, hsdp, local_sgd")])
def test_a_launcher_or_strategy_that_is_not_there_is_refused_with_those_that_are(key, words):
    done = by_hand(ROOT, f"trainer.{key}=slurm")
    assert done.returncode == 1
    assert f"offramp: trainer.{key} = slurm: must be one of {words}; to add one, add a file" in done.stderr


def test_ranks_that_a_full_disk_ended_are_told_by_that_disk(tmp_path, monkeypatch):
    assert "ended with code 1; its last words are in" in launching._reason("pretrain", 1, tmp_path)
    monkeypatch.setattr(launching.shutil, "disk_usage", lambda path: SimpleNamespace(free=512))
    full = f"{tmp_path} is on a full disk (512 bytes are free): make room there, then run the command again"
    assert launching._reason("pretrain", 1, tmp_path) == full
    (tmp_path / "error.txt").write_text("the reason of a rank")
    assert launching._reason("pretrain", 1, tmp_path) == "the reason of a rank"


def test_a_job_is_read_as_it_was_written(tiny_settings, tmp_path):
    place = Place(tmp_path / "root", tmp_path / "out")
    job = Job("pretrain", name_of(pretraining.fits), tiny_settings, place, tmp_path, "cpu", "32-true")
    assert Job.read(job.write()) == job
    assert job.fits_function() is pretraining.fits


def test_a_function_that_ranks_cannot_import_is_refused():
    with pytest.raises(Refusal, match="lambda.*ranks cannot import this function: define it"):
        name_of(lambda settings, place, keep: [])


def test_every_variable_that_training_reads_or_sets_is_listed_with_who_does():
    own = {"TERM"}  # of the terminal
    for path in (ROOT / "stages/training").rglob("*.py"):
        for name in re.findall(r"environ[\w.]*[\[(]\"([A-Z_]+)\"", path.read_text()):
            assert f"{name}" in variables.__doc__ or name in own, f"{path.name} uses {name}"
    for path in (ROOT / "stages").rglob("*.py"):
        if '"DVC_STAGE"' in path.read_text():
            module = ".".join(path.relative_to(ROOT / "stages").with_suffix("").parts)
            assert module in variables.__doc__, f"{module} reads DVC_STAGE"


def test_gradients_of_two_batches_add_up_to_those_of_one_that_is_as_large(tree, tmp_path, monkeypatch):
    from safetensors.torch import load_file

    monkeypatch.setenv("TMPDIR", str(tmp_path))
    weights, losses = [], []
    halved = ["pretrain.batch_sequences=4", "trainer.accumulate_grad_batches=2"]
    for number, words in enumerate((["pretrain.batch_sequences=8"], halved)):
        out = f"outputs/accumulated-{number}"
        words = [*words, "trainer.precision=32-true", "trainer.ranks=1", "pretrain.steps=2", f"hydra.run.dir={out}"]
        done = by_hand(tree, *words)
        assert done.returncode == 0, done.stderr
        weights.append(load_file(tree / out / "artifacts/teacher/model.safetensors"))
        losses.append(float((tree / out / "plots/pretrain/teacher.csv").read_text().splitlines()[-1].split(",")[1]))
        tokens = json.loads((tree / out / "metrics/pretrain.json").read_text())["tokens"]
        assert tokens == 2 * 8 * 64
    assert losses[0] == pytest.approx(losses[1], abs=5e-4), "the same tokens"
    assert not list(tmp_path.glob("torchelastic_*")), "torchrun's logs end with the state"
    one, two = weights
    for name in one:  # the sums differ in the last bit, and Muon rounds to bfloat16
        assert (one[name] - two[name]).norm() < 0.02 * one[name].norm(), name


def test_a_budget_of_activations_changes_what_is_recomputed_and_not_a_byte_of_the_model(tree):
    hashes, loads = [], []
    for number, budget in enumerate(("null", "1500000")):
        out = f"outputs/budget-{number}"
        done = by_hand(
            tree, "pretrain.steps=2", f"trainer.activation_memory_bytes={budget}", "trainer.precision=32-true",
            f"hydra.run.dir={out}",
        )  # fmt: skip
        assert done.returncode == 0, done.stderr
        said = re.search(r"teacher: keeps ([\d,]+) bytes \((\w+)\), [\d.]+% of a forward pass again", done.stdout)
        assert bool(said) == (budget != "null")
        if said:
            assert int(said[1].replace(",", "")) <= 1_500_000 and said[2] != "none"
        hashes.append(sha256_of(tree / out / "artifacts/teacher"))
        loads.append(json.loads((tree / out / "metrics/pretrain.json").read_text()))
    assert hashes[0] == hashes[1] and loads[0] == loads[1]


def test_a_budget_out_of_reach_is_refused_in_one_line_with_what_can_be_reached(tree):
    done = by_hand(tree, "trainer.activation_memory_bytes=1000", "hydra.run.dir=outputs/refused")
    (line,) = [line for line in done.stderr.splitlines() if "activation_memory_bytes" in line]
    assert done.returncode == 1 and "Traceback" not in done.stderr
    assert "keeps so little for teacher (4 sequences of 64 tokens on a rank): set it to " in line
    assert not (tree / "outputs/refused/artifacts/teacher").exists()
