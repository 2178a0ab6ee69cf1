"""Hybrid sharded data parallel: the ranks of a machine share one copy of the model out, and each machine has a copy.

Zhao et al. 2023, "PyTorch FSDP", section 3.2.2. Gathered weights stay inside a machine; between machines travels a
rank's part of the gradients alone. On one machine it is `fsdp2`.
"""

import os

import lightning
import torch.distributed as dist
from lightning.pytorch.strategies import ModelParallelStrategy
from torch.distributed.device_mesh import init_device_mesh

from stages.training.sharding import shard


def lightning_strategy() -> ModelParallelStrategy:
    return ModelParallelStrategy(data_parallel_size=dist.get_world_size(), tensor_parallel_size=1)


def needs_rehearsal(world_size: int) -> bool:
    return False  # the groups of weights are fixed before the first pass


def shard_model(training: lightning.LightningModule) -> None:
    ranks = dist.get_world_size()
    of_machine = int(os.environ.get("LOCAL_WORLD_SIZE", ranks))
    kind = training.trainer.strategy.root_device.type
    shard(training.model, init_device_mesh(kind, (ranks // of_machine, of_machine), mesh_dim_names=("copy", "part")))
