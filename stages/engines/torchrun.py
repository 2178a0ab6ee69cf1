"""Several machines, an agent on each, started by hand: node 0 has the store in which they meet, at a static address."""

import shlex

from stages.engines.plan import LaunchPlan
from stages.settings.bounds import Section


class Options(Section):
    pass


def render(plan: LaunchPlan) -> str:
    """A line for each node: the command of torchrun that it runs."""
    lines = []
    for node_rank in range(plan.nodes):
        words = [plan.python, "-m", "torch.distributed.run", "--nnodes", str(plan.nodes)]
        words += ["--node-rank", str(node_rank), "--nproc-per-node", str(plan.processes_per_node)]
        words += ["--master-addr", plan.master_address or "127.0.0.1", "--master-port", str(plan.master_port)]
        lines.append(shlex.join([*words, "-m", "stages.training.rank", plan.job]))
    return "\n".join(lines) + "\n"
