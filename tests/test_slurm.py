"""A training stage under a real SLURM, where root and Debian's packages are (benchmarks/slurm_cluster.py):

    make test-slurm

Each test trains one model, tiny, and holds its bytes against those of this machine alone.
"""

import contextlib
import importlib.util
import os
import re
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

from benchmarks.checkout import environment, prepared
from benchmarks.slurm_cluster import Cluster, slurm, why_not
from chaos.commands import is_running, processes_of
from stages.files.artifacts import read_json, sha256_of

pytestmark = [pytest.mark.nodes, pytest.mark.skipif(bool(why_not()), reason=f"no SLURM: {why_not()}")]
SECONDS = 300
STEPS = 40
TEACHER = "artifacts/teacher/model.safetensors"
IN_TWO_NODES = ("engine=slurm", "engine.nodes=2", "engine.cpus_per_node=1", "engine.options.partition=usual")


@pytest.fixture(scope="module")
def cluster(tmp_path_factory, two_cores):
    with slurm(tmp_path_factory.mktemp("slurm")) as cluster:
        yield cluster


@pytest.fixture(scope="module")
def tree(tmp_path_factory, two_cores) -> Path:
    """A checkout with its data, which all nodes see."""
    return prepared(tmp_path_factory.mktemp("tree") / "project", "tiny")


@pytest.fixture(scope="module")
def of_one_machine(tree) -> str:
    """The teacher's bytes, of two ranks of this machine."""
    said = pretrain(tree, None, "alone", "trainer.ranks=2").communicate(timeout=SECONDS)[0]
    assert (tree / "outputs/alone" / TEACHER).exists(), said
    return sha256_of(tree / "outputs/alone" / TEACHER)


def pretrain(tree: Path, cluster: Cluster | None, out: str, *words: str, sweep: bool = False) -> subprocess.Popen:
    command = [sys.executable, "-m", "stages.pretrain", *(["-m"] if sweep else []), f"pretrain.steps={STEPS}", *words]
    command.append(f"hydra.{'sweep' if sweep else 'run'}.dir=outputs/{out}")
    variables = environment(MLFLOW_TRACKING_URI="http://127.0.0.1:9")  # nothing listens there
    if cluster:
        command, variables = cluster.command(*command), variables | cluster.environment()
        variables["PATH"] = f"{Path(sys.executable).parent}{os.pathsep}{variables['PATH']}"
    pipe, both = subprocess.PIPE, subprocess.STDOUT
    return subprocess.Popen(command, cwd=tree, env=variables, text=True, stdout=pipe, stderr=both)


def until(found, what: str, running: subprocess.Popen):
    deadline = time.monotonic() + SECONDS
    while not (value := found()):
        assert running.poll() is None, running.communicate()[0]
        assert time.monotonic() < deadline, what
        time.sleep(0.05)
    return value


def saved_step(tree: Path) -> int:
    """Of the checkpoint that a run in work has left; 0: none yet."""
    steps = [read_json(index)["step"] for index in tree.glob(".runs/resume/pretrain-*/teacher.json")]
    return max(steps, default=0)


@contextlib.contextmanager
def at_rest(tree: Path):
    """The ranks stand still meanwhile: none comes to its end before SLURM has acted."""
    ranks = [process for process in processes_of(tree) if is_running(process, "stages.training.rank")]
    for rank in ranks:
        rank.suspend()
    yield
    for rank in ranks:
        with contextlib.suppress(psutil.NoSuchProcess):
            rank.resume()


def test_two_nodes_end_on_the_bytes_of_one_machine(tree, cluster, of_one_machine):
    running = pretrain(tree, cluster, "nodes", *IN_TWO_NODES)
    said = running.communicate(timeout=SECONDS)[0]
    assert running.returncode == 0, said
    assert "for 2 nodes" in said and f"teacher: step {STEPS}/{STEPS}" in said
    assert sha256_of(tree / "outputs/nodes" / TEACHER) == of_one_machine


def test_a_preempted_job_is_requeued_and_continues_to_the_same_bytes(tree, cluster, of_one_machine):
    running = pretrain(tree, cluster, "preempted", *IN_TWO_NODES, "trainer.checkpoint_every_seconds=0")
    step = until(lambda: saved_step(tree), "no checkpoint", running)
    assert step < STEPS
    with at_rest(tree):
        cluster.says("sbatch", "--partition=urgent", "--nodes=2", "--output=/dev/null", "--wrap=srun sleep 1")
        acted = r"PreemptTime=\d|Restarts=1"
        until(lambda: re.search(acted, cluster.says("scontrol", "show", "job")), "not preempted", running)
    said = running.communicate(timeout=SECONDS)[0]
    assert running.returncode == 0, said + cluster.says("scontrol", "show", "job")
    assert "teacher: continues after step" in said
    assert "Restarts=1" in cluster.says("scontrol", "show", "job")
    assert sha256_of(tree / "outputs/preempted" / TEACHER) == of_one_machine


def test_a_job_that_its_time_limit_ended_is_continued_by_the_same_command_to_the_same_bytes(
    tree, cluster, of_one_machine
):
    words = (*IN_TWO_NODES, "engine.time_limit=00:00:10:00", "trainer.checkpoint_every_seconds=0")
    running = pretrain(tree, cluster, "limited", *words)
    assert until(lambda: saved_step(tree), "no checkpoint", running) < STEPS
    (number,) = cluster.says("squeue", "--noheader", "--format=%i").split()
    with at_rest(tree):  # SLURM looks every half a minute
        cluster.says("scontrol", "update", f"JobId={number}", "EndTime=now")  # as if the ten minutes were over
        until(lambda: "JobState=RUNNING" not in cluster.says("scontrol", "show", "job", number), "not ended", running)
    said = running.communicate(timeout=SECONDS)[0]
    assert running.returncode == 1 and "Traceback" not in said, said
    assert f"pretrain: job {number} of SLURM ended (TIMEOUT)" in said
    stopped = re.search(r"offramp: teacher: interrupted after (step \d+ of \d+)", said)
    assert stopped, said
    running = pretrain(tree, cluster, "limited", *words)
    said = running.communicate(timeout=SECONDS)[0]
    assert running.returncode == 0 and f"teacher: continues after {stopped[1]}" in said, said
    assert sha256_of(tree / "outputs/limited" / TEACHER) == of_one_machine


@pytest.mark.skipif(importlib.util.find_spec("submitit") is None, reason="pip install -e '.[slurm]'")
def test_a_sweep_runs_each_job_on_a_node(tree, cluster):
    launcher = ("hydra/launcher=submitit_slurm", "hydra.launcher.partition=usual", "hydra.launcher.cpus_per_task=1")
    words = ("optimizer.adamw_learning_rate=0.001,0.002", "pretrain.steps=2", "trainer.ranks=1", *launcher)
    running = pretrain(tree, cluster, "sweep", *words, sweep=True)
    said = running.communicate(timeout=SECONDS)[0]
    assert running.returncode == 0, said
    for number in range(2):
        assert (tree / f"outputs/sweep/{number}" / TEACHER).exists(), said
    assert len(list((tree / "outputs/sweep/.submitit").glob("*_0"))) >= 1
