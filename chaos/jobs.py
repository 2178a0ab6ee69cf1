"""What a scheduler does to a training job of two nodes; SLURM is a stand-in here (chaos/scheduler.py)."""

import re
from pathlib import Path

from chaos.bench import Bench, Row, in_sheet, remove_results
from chaos.commands import (
    HANG_SECONDS,
    REPRO,
    checkpoint_of,
    free_port,
    is_running,
    line_with,
    output_of,
    processes_of,
    refuses,
    start,
    succeeds,
    wait_for,
    wait_until_idle,
)
from chaos.kills import kill_group
from chaos.nodes import NODES, cores_of
from chaos.scheduler import FULL, OVER, stand_in

AT_WORK = ("node", "rank")  # agents and ranks of a job
SECRETS = {
    "AWS_SECRET_ACCESS_KEY": "wJalrXUtnFEMIofnobody",
    "HF_TOKEN": "hf_ofnobodyatall00000",
    "MLFLOW_TRACKING_PASSWORD": "pass-of-nobody",
}


def submitted(bench: Bench, name: str) -> tuple[Path, Path, dict[str, str]]:
    """A copy whose teacher is to be trained, the scheduler's folder, and the variables with which it is found."""
    tree, scheduler = bench.copy(name), bench.folder / f"{name}-slurm"
    remove_results(tree, "pretrain")
    return tree, scheduler, {"PATH": stand_in(scheduler, len(cores_of(0)))}


def engine() -> str:
    return f"engine: {{name: slurm, nodes: {NODES}, master_port: {free_port()}}}"


def queue_full(bench: Bench, row: Row) -> None:
    """SLURM's queue takes no more jobs of the user (sbatch stands in, with SLURM's words); later it does"""
    tree, scheduler, variables = submitted(bench, "queue-full")
    with in_sheet(tree, engine()):
        (scheduler / FULL).touch()
        row.tried += 1
        row.message = refuses(tree, "sbatch took no job .* the queue is full", *REPRO, "pretrain", **variables)
        (scheduler / FULL).unlink()
        succeeds(tree, *REPRO, "pretrain", **variables)
    bench.finish(tree, row)
    row.survived += 1


def time_limit(bench: Bench, row: Row) -> None:
    """a job of two nodes is ended at its time limit by SIGTERM (SLURM stands in); then the same command"""
    tree, scheduler, variables = submitted(bench, "time-limit")
    with in_sheet(tree, engine()):
        process = start(tree, *REPRO, "pretrain", **variables, **SECRETS)
        wait_for(lambda: checkpoint_of(tree), process, tree)
        row.tried += 1
        (scheduler / OVER).touch()
        assert process.wait(HANG_SECONDS) != 0
        assert "Traceback" not in output_of(tree), output_of(tree)[-3000:]
        row.message = line_with(r"ended \(TIMEOUT\)", output_of(tree))
        stopped = re.search(r"interrupted after (step \d+ of \d+)", output_of(tree))
        assert stopped, output_of(tree)[-3000:]
        found = [path for path in tree.rglob("*") if path.is_file() and holds_a_secret(path)]
        assert not found, f"a credential stands in {found}"
        (scheduler / OVER).unlink()
        line_with(f"continues after {stopped[1]}", succeeds(tree, *REPRO, "pretrain", **variables))
    bench.finish(tree, row)
    row.survived += 1


def holds_a_secret(path: Path) -> bool:
    content = path.read_bytes()
    return any(secret.encode() in content for secret in SECRETS.values())


def job_left_behind(bench: Bench, row: Row) -> None:
    """two jobs on one state folder: who waits for one is killed, the same command starts another (SLURM stands in)"""
    tree, _, variables = submitted(bench, "job-left-behind")
    with in_sheet(tree, engine()):
        process = start(tree, *REPRO, "pretrain", **variables)
        wait_for(lambda: checkpoint_of(tree), process, tree)
        at_work = [p for p in processes_of(tree) if any(is_running(p, f"stages.training.{one}") for one in AT_WORK)]
        for process_of_job in at_work:  # it must not end before the next one looks
            process_of_job.suspend()
        row.tried += 1
        kill_group(tree, process)
        process.wait()
        row.message = refuses(tree, "the ranks of the run before have not ended", *REPRO, "pretrain", **variables)
        for process_of_job in at_work:
            process_of_job.resume()
        wait_until_idle(tree, HANG_SECONDS, mirrors=False)
        told = succeeds(tree, *REPRO, "pretrain", **variables)
        assert "of SLURM" not in told, f"a third job, for what the first has done:\n{told[-3000:]}"
    bench.finish(tree, row)
    row.survived += 1
