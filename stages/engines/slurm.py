"""SLURM: one job of all nodes, started by sbatch, which waits for its end.

The script starts an agent on each node with srun. scancel, the time limit and a preemption send SIGTERM to them: ranks
save their exact state, and a requeued job, or the same command, continues. A preempted job whose ranks have ended has
failed in SLURM's eyes, so its script puts it back into the queue.
"""

import contextlib
import re
import shlex
import shutil
import signal
import subprocess
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Annotated

from stages.engines.plan import LaunchPlan, node_command
from stages.files.artifacts import Refusal, write_atomically
from stages.settings.bounds import NotStrict, Section, Word

LOG = "slurm.log"
LOOK_SECONDS = 1.0  # between two looks at the log
PREEMPTED = """scontrol show job "$SLURM_JOB_ID" | grep -q 'PreemptTime=[0-9]'"""
STOPS = (signal.SIGTERM, signal.SIGINT)
ADVICE = {  # by what SLURM says; else what was asked for is at fault
    r"SubmitJob|[Qq]ueue full|temporarily un": "the queue is full: when one of your jobs has ended, run this again",
    r"contact|connect|configuration source": "run this on a login node of a cluster that is up",
    "": "engine.nodes, engine.time_limit, engine.options and what a node is asked for are to be what the cluster has",
}
MISSING = (
    "sbatch is not installed here: run this on a login node of the cluster, or print the script with"
    " engine.dry_run=true and take it there"
)


class Options(Section):
    partition: Word | None = None
    account: Word | None = None
    qos: Word | None = None
    setup: Word | None = None
    directives: Annotated[tuple[Word, ...], NotStrict] = ()


def render(plan: LaunchPlan) -> str:
    """The script for sbatch."""
    own = plan.options
    asked = {
        "job-name": plan.name,
        "nodes": plan.nodes,
        "ntasks-per-node": 1,
        "cpus-per-task": plan.cpus_per_node,
        "gpus-per-node": plan.gpus_per_node or None,
        "mem": plan.memory_gigabytes_per_node and f"{plan.memory_gigabytes_per_node}G",
        "time": plan.time_limit_seconds and _limit(plan.time_limit_seconds),
        "partition": own.partition,
        "account": own.account,
        "qos": own.qos,
        "chdir": plan.project,
        "output": f"{plan.state}/{LOG}",
        "open-mode": "append",
    }
    words = [f"--{name}={value}" for name, value in asked.items() if value is not None]
    agent = node_command(plan, '"$SLURM_NODEID"', '"$0"')
    lines = ["#!/bin/bash", *(f"#SBATCH {word}" for word in [*words, "--requeue", *own.directives]), "set -eu"]
    lines += [f"export {name}={shlex.quote(value)}" for name, value in sorted(plan.environment.items())]
    lines += [own.setup] if own.setup else []
    lines += ['master=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)']
    lines += [f"srun --kill-on-bad-exit=1 bash -c {shlex.quote(f'exec {agent}')} \"$master\" && exit"]
    lines += ["code=$?", f'if {PREEMPTED}; then scontrol requeue "$SLURM_JOB_ID"; fi', 'exit "$code"']
    return "\n".join(lines) + "\n"


def _limit(seconds: int) -> str:
    """D-HH:MM:SS."""
    minutes, seconds = divmod(seconds, 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours // 24}-{hours % 24:02}:{minutes:02}:{seconds:02}"


def run(plan: LaunchPlan, told: Callable[[str], None]) -> str:
    sbatch = shutil.which("sbatch")
    if sbatch is None:
        raise Refusal(MISSING)
    script, log, errors = (Path(plan.state) / name for name in ("job.sbatch", LOG, "sbatch.log"))
    write_atomically(script, render(plan))
    start = log.stat().st_size if log.exists() else 0
    command = [sbatch, "--parsable", "--wait", str(script)]
    with errors.open("wb") as said:
        waiting = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=said, text=True, start_new_session=True)
    with _followed(errors, 0, told):  # where the queue is full, sbatch says so and tries again
        number = _number(waiting)
    if number is None:
        waiting.wait()
        raise Refusal(_not_taken(_words(errors) or f"code {waiting.returncode}"))
    told(f"job {number} of SLURM, for {plan.nodes} nodes; its log is {log}")
    with _on_signals(lambda *_: _cancel(number)), _followed(log, start, told):  # whose ranks then save their state
        waiting.wait()
    if waiting.returncode == 0:
        return ""
    state = _state(number) or _words(errors) or f"code {waiting.returncode}"
    return f"job {number} of SLURM ended ({state}); the same command continues from the last checkpoint"


def _number(waiting: subprocess.Popen[str]) -> str | None:
    """Of the job, once SLURM has taken it; None where it has not. A signal before that leaves no job behind."""
    assert waiting.stdout
    try:
        with _on_signals(signal.default_int_handler):
            said = waiting.stdout.readline()
    except KeyboardInterrupt:
        waiting.terminate()
        if found := re.match(r"\d+", waiting.communicate()[0]):
            _cancel(found[0])
        raise
    found = re.match(r"\d+", said)
    return found and found[0]


def _not_taken(said: str) -> str:
    advice = next(advice for pattern, advice in ADVICE.items() if re.search(pattern, said))
    return f"sbatch took no job ({said}): {advice}"


def _words(errors: Path) -> str:
    """What sbatch says, in a line."""
    lines = errors.read_text(errors="replace").splitlines()
    return "; ".join(re.sub(r"^sbatch: (error|fatal): ", "", line) for line in lines)


def _cancel(number: str) -> None:
    subprocess.run(["scancel", number], capture_output=True)


@contextlib.contextmanager
def _on_signals(answer: Callable) -> Iterator[None]:
    """SIGTERM and Ctrl-C are answered with this."""
    before = {stop: signal.signal(stop, answer) for stop in STOPS}
    try:
        yield
    finally:
        for stop, handler in before.items():
            signal.signal(stop, handler)


@contextlib.contextmanager
def _followed(log: Path, start: int, told: Callable[[str], None]) -> Iterator[None]:
    """Hands on the lines that the ranks print while they do."""
    ended = threading.Event()

    def follow():
        position, last = start, False
        while not last:
            last = ended.wait(LOOK_SECONDS)  # what was written before the end is still read
            with contextlib.suppress(OSError), log.open("rb") as file:
                file.seek(position)
                *lines, rest = file.read().split(b"\n")
                position = file.tell() - len(rest)
                for line in lines:
                    told(line.decode("utf-8", "replace"))

    thread = threading.Thread(target=follow)
    thread.start()
    try:
        yield
    finally:
        ended.set()
        thread.join()


def _state(number: str) -> str:
    """The job's last state, such as TIMEOUT, while SLURM still knows it."""
    with contextlib.suppress(OSError):
        shown = subprocess.run(["scontrol", "show", "job", number], capture_output=True, text=True).stdout
        if found := re.search(r"JobState=(\w+)", shown):
            return found[1]
    return ""
