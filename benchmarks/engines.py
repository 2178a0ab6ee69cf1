"""The engines side by side: one training stage, the same seed and batches, on every engine that can run here, and
whether they end on the same bytes. Of the others, the document and the parser of the engine that read it.

    python -m benchmarks.engines        # some minutes; writes benchmarks/engines.md, fails where bytes differ

Two ranks of one thread each train the teacher of scale tiny: on this machine; by torchrun on two nodes, which are
network namespaces (benchmarks/nodes.py) with a checkout each; by a real SLURM of two nodes
(benchmarks/slurm_cluster.py); on two workers of Ray. What is not installed is named, with how to get it.
"""

import csv
import importlib.metadata
import importlib.util
import os
import shutil
import subprocess
import sys
import tempfile
import xml.etree.ElementTree
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from benchmarks import slurm_cluster
from benchmarks.checkout import environment
from benchmarks.nodes import of_any_kind
from benchmarks.slow_link import checkouts, start
from benchmarks.table import ROOT
from stages.files.artifacts import sha256_of, write_atomically

RANKS, STEPS, SECONDS = 2, 12, 600
WORDS = (f"pretrain.steps={STEPS}", "trainer.accelerator=cpu", f"trainer.ranks={RANKS}")
PARSER_TESTS = "tests/test_engine_parsers.py"
PARSERS = {  # by engine: the test in which its parser reads the document, and the packages that are the parser
    "skypilot": ("test_skypilot_reads_the_task", ("skypilot",)),
    "kubernetes, TrainJob": ("test_kubeflow_reads_a_train_job_and_drops_no_key_of_it", ("kubeflow-trainer-api",)),
    "kubernetes, Job": ("test_kubernetes_takes_the_job_and_its_service_under_strict_rules", ("kubernetes-validate",)),
    "sagemaker": (
        "test_sagemaker_takes_the_request_by_the_rules_of_its_service_and_a_server_keeps_it",
        ("boto3", "moto[sagemaker]"),
    ),
}
READ, UNREAD = "rendered, read by {}", "rendered; not read here: make test-engines installs {}"


@dataclass(frozen=True)
class Outcome:
    """Of one engine: what became of it here, and of a run its last loss in nats and its weights."""

    engine: str
    how: str
    nodes: int = 0
    loss: float | None = None
    bits_per_byte: float | None = None  # of the validation split
    sha256: str = ""


class NotHere(Exception):
    """Why an engine cannot run on this machine, and how to get it."""


# ---- what runs


def on_this_machine(trees: Sequence[Path], out: str) -> tuple[int, str]:
    _finished(_pretrain("engine=local", out), trees[0])
    return 1, "ran"


def by_torchrun(trees: Sequence[Path], out: str) -> tuple[int, str]:
    with of_any_kind(len(trees)) as nodes:
        running = start(trees, nodes, *WORDS, f"hydra.run.dir={out}")
        said = [process.communicate(timeout=SECONDS)[0] for process in running]
        if any(process.returncode for process in running):
            raise RuntimeError("a node failed:\n" + "\n".join(said))
        where = "network namespaces" if nodes[0].name else "agents on the loopback interface"
    return len(trees), f"ran: two {where}"


def by_slurm(trees: Sequence[Path], out: str) -> tuple[int, str]:
    if reason := slurm_cluster.why_not():
        raise NotHere(reason)
    with tempfile.TemporaryDirectory() as folder, slurm_cluster.slurm(Path(folder)) as cluster:
        words = ("engine.nodes=2", "engine.cpus_per_node=1", "engine.options.partition=usual")
        command = cluster.command(*_pretrain("engine=slurm", out, *words))
        variables = cluster.environment()
        variables["PATH"] = f"{Path(sys.executable).parent}{os.pathsep}{variables['PATH']}"
        _finished(command, trees[0], variables)
        version = cluster.says("sinfo", "--version").split()[-1]
    return 2, f"ran: SLURM {version}, two nodes in network namespaces"


def by_ray(trees: Sequence[Path], out: str) -> tuple[int, str]:
    if importlib.util.find_spec("ray") is None:
        raise NotHere("ray is not installed: make test-engines")
    one_core = ("taskset", "--cpu-list", str(min(os.sched_getaffinity(0))))  # Ray's workers see all cores of a machine
    _finished([*one_core, *_pretrain("engine=ray", out)], trees[0])
    return 2, f"ran: Ray {importlib.metadata.version('ray')}, two workers of this machine"


RUNS: dict[str, Callable[[Sequence[Path], str], tuple[int, str]]] = {
    "local": on_this_machine,
    "torchrun": by_torchrun,
    "slurm": by_slurm,
    "ray": by_ray,
}


def _pretrain(engine: str, out: str, *words: str) -> list[str]:
    return [sys.executable, "-m", "stages.pretrain", engine, *WORDS, *words, f"hydra.run.dir={out}"]


def _finished(command: Sequence[str], tree: Path, variables: dict[str, str] | None = None) -> None:
    theirs = environment(MLFLOW_TRACKING_URI="http://127.0.0.1:9") | (variables or {})  # nothing listens there
    pipe, both = subprocess.PIPE, subprocess.STDOUT
    done = subprocess.run(command, cwd=tree, env=theirs, text=True, stdout=pipe, stderr=both, timeout=SECONDS)
    if done.returncode:
        raise RuntimeError(f"{' '.join(command)}:\n{done.stdout}")


def outcome(engine: str, trees: Sequence[Path]) -> Outcome:
    out = f"outputs/{engine}"
    try:
        nodes, how = RUNS[engine](trees, out)
    except NotHere as reason:
        return Outcome(engine, f"not here: {reason}")
    *_, last = csv.DictReader((trees[0] / out / "plots/pretrain/teacher.csv").open())
    sha256 = sha256_of(trees[0] / out / "artifacts/teacher/model.safetensors")
    return Outcome(engine, how, nodes, float(last["loss"]), float(last["validation_bits_per_byte"]), sha256)


# ---- what is rendered


def rendered() -> list[Outcome]:
    """What the tests find when each engine's own parser reads its document."""
    with tempfile.TemporaryDirectory() as folder:
        report = Path(folder) / "report.xml"
        command = [sys.executable, "-m", "pytest", "-q", PARSER_TESTS, f"--junit-xml={report}"]
        done = subprocess.run(command, cwd=ROOT, env=environment(), capture_output=True, text=True, timeout=SECONDS)
        if not report.exists():
            raise RuntimeError(f"{PARSER_TESTS}:\n{done.stdout}{done.stderr}")
        cases = xml.etree.ElementTree.parse(report).iter("testcase")
        found = {str(case.get("name")): {part.tag for part in case} for case in cases}
    pins = (ROOT / "tests/engines.txt").read_text().splitlines()
    versions = dict(line.split("==") for line in pins if "==" in line)
    return [_read(engine, found[test], packages, versions) for engine, (test, packages) in PARSERS.items()]


def _read(engine: str, marks: set[str], packages: tuple[str, ...], versions: Mapping[str, str]) -> Outcome:
    if marks & {"failure", "error"}:
        raise RuntimeError(f"{engine}: its parser does not take the document: python -m pytest {PARSER_TESTS}")
    parser = " and ".join(f"{package} {versions[package]}" for package in packages)
    return Outcome(engine, (UNREAD if "skipped" in marks else READ).format(parser))


# ---- the table


def differing(outcomes: Sequence[Outcome]) -> list[str]:
    """The engines that ended on other bytes than the first one that ran."""
    ran = [one for one in outcomes if one.sha256]
    return [one.engine for one in ran if one.sha256 != ran[0].sha256]


def as_markdown(outcomes: Sequence[Outcome]) -> str:
    lines = [
        "# One stage on every engine",
        "",
        f"`python -m benchmarks.engines`: `pretrain` at scale tiny, {STEPS} steps, {RANKS} ranks of one thread, the",
        "same seed and batches. Loss is that of the last step, in nats; bits per byte are of the validation split; the",
        "SHA-256 is of the weights, its first 16 digits.",
        "",
        "| engine | here | nodes x ranks | loss | bits per byte | SHA-256 | bytes equal |",
        "| --- | --- | --- | ---: | ---: | --- | --- |",
    ]
    differ = differing(outcomes)
    for number, one in enumerate(outcomes):
        if not one.sha256:
            lines.append(f"| {one.engine} | {one.how} | | | | | |")
            continue
        equal = "NO" if one.engine in differ else "yes" if number else "(the first)"
        figures = f"{one.loss:.5f} | {one.bits_per_byte:.5f} | `{one.sha256[:16]}` | {equal}"
        lines.append(f"| {one.engine} | {one.how} | {one.nodes} x {RANKS // one.nodes} | {figures} |")
    return "\n".join(lines) + "\n"


def main() -> None:
    if shutil.which("taskset") is None:
        sys.exit("benchmarks.engines: taskset is not installed (package util-linux): it gives each rank a core")
    os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[:RANKS])  # so that a rank has one thread
    with tempfile.TemporaryDirectory() as folder:
        trees = checkouts(Path(folder), 2)
        outcomes = [outcome(engine, trees) for engine in RUNS]
    text = as_markdown([*outcomes, *rendered()])
    print(text)
    write_atomically(ROOT / "benchmarks/engines.md", text)
    if differ := differing(outcomes):
        sys.exit(f"benchmarks.engines: other bytes than {outcomes[0].engine}: {', '.join(differ)}")


if __name__ == "__main__":
    main()
