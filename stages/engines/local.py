"""This machine: torchrun with a store on the loopback interface."""

import shlex

from stages.engines.plan import LaunchPlan
from stages.settings.bounds import Section


class Options(Section):
    pass


def render(plan: LaunchPlan) -> str:
    """The same as a command of torchrun, which can be started beside DVC."""
    words = [plan.python, "-m", "torch.distributed.run", "--nproc-per-node", str(plan.processes_per_node)]
    words += ["--master-addr", "127.0.0.1", "--master-port", str(plan.master_port)]
    return shlex.join([*words, "-m", "stages.training.rank", plan.job]) + "\n"
