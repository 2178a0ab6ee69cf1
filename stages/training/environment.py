"""Every environment variable by which processes of this project tell each other something.

variable: set by -> read by

DVC_STAGE: DVC, for each stage that it runs
    -> run.entry, files.artifacts, files.resuming, tracking.record and the stage config: does DVC run this, or a hand?
RANK, LOCAL_RANK, WORLD_SIZE, LOCAL_WORLD_SIZE, GROUP_RANK, GROUP_WORLD_SIZE, MASTER_ADDR, MASTER_PORT: the launcher
    (torchrun), for each rank
    -> training.rank, training.saves, training.sharing, the strategies hsdp and local_sgd, torch.distributed, Lightning
OMP_NUM_THREADS, MKL_NUM_THREADS: `rank_environment` -> torch in a rank
NCCL_ALGO, TORCHINDUCTOR_DETERMINISTIC: `rank_environment`, where deterministic GPUs train -> NCCL, torch in a rank
GLOO_SOCKET_IFNAME, NCCL_SOCKET_IFNAME, TORCH_CPP_LOG_LEVEL, PYTHONPATH: `agent_environment`
    and Nodes.network_environment where there are several machines -> gloo, NCCL, torch and Python in a rank
CUBLAS_WORKSPACE_CONFIG: training.fit.settle_cublas_workspaces -> torch and cuBLAS; removed when that call ends

What the stages, the launcher and the ranks agree on otherwise stands in job.json (stages/training/job.py).
"""

import os

from stages.files.artifacts import ROOT


def agent_environment() -> dict[str, str]:
    """For the process that starts the ranks of one machine: ranks listen for each other only."""
    path = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
    loopback = {"GLOO_SOCKET_IFNAME": "lo", "NCCL_SOCKET_IFNAME": "lo"}
    return os.environ | loopback | {"TORCH_CPP_LOG_LEVEL": "ERROR", "PYTHONPATH": path}


def rank_environment(conditions: dict) -> dict[str, str]:
    """What must be set before a rank's process starts, so that it computes under these conditions."""
    threads = str(conditions["threads_per_rank"])
    variables = {"OMP_NUM_THREADS": threads, "MKL_NUM_THREADS": threads}  # torch takes MKL's number over OpenMP's
    if conditions["accelerator"] != "none" and conditions["deterministic"]:
        # NCCL sums in one order only where the switch does not add for it, the compiler only where it does not try
        # out which order is the fastest
        variables |= {"NCCL_ALGO": "Ring", "TORCHINDUCTOR_DETERMINISTIC": "1"}
    return variables
