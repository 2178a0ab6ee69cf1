"""One node of a job that an engine has placed: `python -m stages.training.node job.json --nodes 2 --node-rank 1 ...`.

Every engine starts this once on each machine (stages/engines/plan.py). It looks what there is to train on, meets the
other nodes and starts the ranks; node 0 leaves the conditions beside the job, for the stage that waits for them.
"""

import argparse
import os
import sys
from pathlib import Path

from stages.files.artifacts import Refusal, write_atomically, write_json
from stages.run.entry import die_with_parent, leave
from stages.training.environment import agent_environment, rank_environment
from stages.training.job import Job
from stages.training.nodes import Nodes


def parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m stages.training.node", description=__doc__.split("\n")[0])
    parser.add_argument("job", type=Path)
    parser.add_argument("--nodes", type=int, default=1)
    parser.add_argument("--processes", type=int, required=True, help="ranks on each node")
    parser.add_argument("--node-rank", type=int, default=0)
    parser.add_argument("--master-address", default="127.0.0.1")
    parser.add_argument("--master-port", type=int, default=0)
    parser.add_argument("--join-seconds", type=float, default=600.0)
    return parser


def main(arguments: list[str]) -> int:
    asked = parser().parse_args(arguments)
    nodes = Nodes(asked.nodes, asked.node_rank, asked.master_address, asked.master_port, asked.join_seconds)
    path = asked.job.absolute()
    try:
        job = Job.read(path)
        os.environ |= agent_environment()
        if nodes.count > 1:
            nodes = nodes.resolved()
            os.environ |= nodes.network_environment()
        from stages.training.machine import conditions  # late: torch reads the environment when it is imported

        found = conditions(job.settings.trainer.model_dump(), nodes.count, asked.processes)
        if nodes.rank == 0:
            write_json(path.parent / "conditions.json", found)
    except Refusal as refusal:
        print(f"offramp: {refusal}", file=sys.stderr, flush=True)
        write_atomically(path.parent / "error.txt", str(refusal))
        return 1
    from stages.training.rendezvous import run_ranks

    os.environ |= rank_environment(found)
    return run_ranks(path, asked.processes, nodes)


if __name__ == "__main__":
    die_with_parent()  # whatever an engine starts it from: ranks must not outlive their job
    leave(main(sys.argv[1:]))
