"""A real SLURM of a controller and some nodes on this machine, from Debian's packages; each is a network namespace.

It has an own munge with a key of its own, reads and writes below one folder, and leaves nothing behind. Nodes are
called node1, node2, ...; the controller, `head`, is the login node.
"""

import contextlib
import os
import shutil
import subprocess
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from benchmarks import nodes as network
from benchmarks.nodes import Node

TOOLS = ("slurmctld", "slurmd", "sbatch", "munged", "mungekey")
INSTALL = "apt-get install --no-install-recommends slurmctld slurmd slurm-client munge"
START_SECONDS = 60
CREDENTIAL_SECONDS = 5  # a requeued job waits until its credential has expired: by default two minutes
CONF = """
ClusterName=offramp
SlurmctldHost=head({head})
SlurmctldPort=6817
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
CredType=cred/munge
AuthInfo=socket={folder}/munge.socket,cred_expire={expire}
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool-%n
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd-%n.pid
SlurmctldLogFile={folder}/slurmctld.log
SlurmdLogFile={folder}/slurmd-%n.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
SlurmdParameters=config_overrides
ReturnToService=2
MpiDefault=none
SlurmdTimeout=300
KillWait=30
SchedulerParameters=sched_interval=2,bf_interval=2
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
{nodes}
PartitionName=usual Nodes=ALL Default=YES PriorityTier=1 GraceTime=60 MaxTime=INFINITE State=UP
PartitionName=urgent Nodes=ALL PriorityTier=10 PreemptMode=OFF MaxTime=INFINITE State=UP
"""


def why_not() -> str:
    """Why there can be no cluster here; empty where there can."""
    missing = [tool for tool in TOOLS if shutil.which(tool, path=_path()) is None]
    if missing:
        return f"{', '.join(missing)} is not installed: {INSTALL}"
    return network.why_not()


@dataclass(frozen=True)
class Cluster:
    folder: Path
    head: Node

    def command(self, *words: str) -> list[str]:
        """These words, run on the login node."""
        return _inside(self.folder, self.head, "head", *words)

    def environment(self) -> dict[str, str]:
        return {"SLURM_CONF": str(self.folder / "slurm.conf"), "PATH": _path()}

    def says(self, *words: str) -> str:
        done = subprocess.run(self.command(*words), env=os.environ | self.environment(), capture_output=True, text=True)
        return done.stdout + done.stderr


@contextlib.contextmanager
def slurm(folder: Path, count: int = 2) -> Iterator[Cluster]:
    """So many idle nodes, each of one core and with two partitions: jobs of `urgent` requeue those of `usual`."""
    folder.mkdir(parents=True, exist_ok=True)
    with network.machines(count + 1) as (head, *nodes), contextlib.ExitStack() as stack:
        cluster = Cluster(folder, head)
        _configure(folder, head, nodes)
        environment, cores_here = os.environ | cluster.environment(), len(os.sched_getaffinity(0))

        def start(*words: str) -> None:
            log = stack.enter_context((folder / "daemons.log").open("ab"))
            process = subprocess.Popen(words, env=environment, stdout=log, stderr=log)
            stack.callback(process.wait)
            stack.callback(process.kill)

        munge = [f"--{name}-file={folder}/munge.{name}" for name in ("key", "pid", "log", "seed")]
        start("munged", "--foreground", "--force", f"--socket={folder}/munge.socket", *munge)
        start(*_inside(folder, head, "head", "slurmctld", "-D", "-i"))
        for number, node in enumerate(nodes, 1):
            core = sorted(os.sched_getaffinity(0))[number % cores_here]
            daemon = ("taskset", "--cpu-list", str(core), "slurmd", "-D", "-N", f"node{number}")
            start(*_inside(folder, node, f"node{number}", *daemon))
        _wait_until_idle(cluster, count)
        yield cluster


def _configure(folder, head, nodes):
    names = {"head": head} | {f"node{number}": node for number, node in enumerate(nodes, 1)}
    hosts = "".join(f"{node.address} {name}\n" for name, node in names.items())
    (folder / "hosts").write_text(f"127.0.0.1 localhost\n{hosts}")
    lines = [
        f"NodeName={name} NodeAddr={node.address} CPUs=1 RealMemory=1000 State=UNKNOWN"
        for name, node in names.items()
        if name != "head"
    ]
    text = CONF.format(head=head.address, folder=folder, nodes="\n".join(lines), expire=CREDENTIAL_SECONDS)
    (folder / "slurm.conf").write_text(text)
    (folder / "cgroup.conf").write_text("CgroupPlugin=cgroup/v1\n")
    (folder / "state").mkdir(exist_ok=True)
    if not (folder / "munge.key").exists():
        subprocess.run(["mungekey", "--create", f"--keyfile={folder}/munge.key"], env={"PATH": _path()}, check=True)


def _inside(folder: Path, node: Node, host: str, *words: str) -> list[str]:
    """With the host's own name, and with the names of the others."""
    script = f'mount --bind "{folder}/hosts" /etc/hosts && hostname {host} && exec "$@"'
    return node.command("unshare", "--uts", "sh", "-c", script, "sh", *words)


def _wait_until_idle(cluster, count):
    deadline = time.monotonic() + START_SECONDS
    while (said := cluster.says("sinfo", "--noheader", "--partition=usual", "--Node", "--format=%T")).split() != [
        "idle"
    ] * count:
        if time.monotonic() > deadline:
            raise RuntimeError(f"the nodes are not idle but {said}: see {cluster.folder}")
        time.sleep(0.2)


def _path() -> str:
    return f"{os.environ.get('PATH', '')}:/usr/sbin:/sbin"
