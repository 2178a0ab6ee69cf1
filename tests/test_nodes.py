"""Several machines train one model: network namespaces, or agents on the loopback interface where those cannot be made.

Each node has a checkout of its own, a network interface and one core.
"""

import contextlib
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from benchmarks.checkout import stage
from benchmarks.nodes import PREFIX, Node, machines, of_any_kind, why_not
from benchmarks.slow_link import checkouts, start
from stages.files.artifacts import read_json, sha256_of

SECONDS = 120
TEACHER = "outputs/run/artifacts/teacher/model.safetensors"
WORDS = ("pretrain.steps=12", "trainer.checkpoint_every_seconds=0", "hydra.run.dir=outputs/run")


@pytest.fixture(scope="module")
def trees(tmp_path_factory, two_cores) -> list[Path]:
    return checkouts(tmp_path_factory.mktemp("nodes"), 2)


def until_saved(tree: Path, running: list[subprocess.Popen]) -> int:
    """Waits for a checkpoint of this tree; its step."""
    deadline = time.monotonic() + SECONDS
    while time.monotonic() < deadline:
        assert all(process.poll() is None for process in running), [process.communicate()[0] for process in running]
        for index in tree.glob(".runs/resume/pretrain-*/teacher.json"):
            return read_json(index)["step"]
        time.sleep(0.02)
    raise AssertionError("no checkpoint")


def listening(node: Node) -> set[str]:
    """The addresses on which anything on this node takes connections."""
    shown = subprocess.run(node.command("ss", "-ltnH"), capture_output=True, text=True, check=True).stdout
    return {line.split()[3].rpartition(":")[0] for line in shown.splitlines()}


def lose(tree: Path) -> None:
    """Kills all processes that work in a node's checkout, at once."""
    for folder in Path("/proc").glob("[0-9]*/cwd"):
        with contextlib.suppress(OSError):  # it has ended, or is not ours
            if Path(os.readlink(folder)) == tree:
                os.kill(int(folder.parent.name), signal.SIGKILL)


@pytest.mark.nodes
def test_a_node_that_was_killed_and_started_again_ends_on_the_bytes_of_one_machine(trees):
    stage(trees[0], "pretrain", *WORDS, "trainer.ranks=2")
    of_one_machine = sha256_of(trees[0] / TEACHER)
    (trees[0] / TEACHER).unlink()

    with of_any_kind(2) as nodes:
        running = start(trees, nodes, *WORDS)
        step = until_saved(trees[0], running)
        for node in filter(lambda node: node.name, nodes):  # all that listens in a namespace is ours
            assert listening(node) == {node.address}
        lose(trees[1])
        said = running[0].communicate(timeout=SECONDS)[0]
        running[1].communicate()
        assert step < 12 and running[0].returncode == 1, said
        assert "the same command on every node continues from the last checkpoint" in said and "Traceback" not in said

        running = start(trees, nodes, *WORDS)
        said = [process.communicate(timeout=SECONDS)[0] for process in running]
        assert [process.returncode for process in running] == [0, 0], said
        assert "teacher: continues after step" in said[0]
    assert sha256_of(trees[0] / TEACHER) == of_one_machine
    assert not (trees[1] / TEACHER).exists(), "node 0 writes the outs"


@pytest.mark.skipif(bool(why_not()), reason=why_not())
def test_nodes_are_gone_with_all_that_ran_in_them_also_where_their_maker_was_killed():
    with pytest.raises(ZeroDivisionError), machines(2) as nodes:
        sleeper = subprocess.Popen(nodes[1].command("sleep", "60"))
        raise ZeroDivisionError
    assert sleeper.wait(5) == -signal.SIGKILL

    dies = "import os\nfrom benchmarks.nodes import machines\nwith machines(1): os.kill(os.getpid(), 9)"
    killed = subprocess.Popen([sys.executable, "-c", dies])
    assert killed.wait(30) == -signal.SIGKILL
    assert f"{PREFIX}{killed.pid}-" in namespaces(), "nobody could remove it"
    with machines(1):
        assert f"{PREFIX}{killed.pid}-" not in namespaces()
    assert f"{PREFIX}{os.getpid()}-" not in namespaces()


def namespaces() -> str:
    return subprocess.run(["ip", "netns", "list"], capture_output=True, text=True, check=True).stdout
