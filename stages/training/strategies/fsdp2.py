"""Fully sharded data parallel (FSDP2): each rank keeps a part of every weight, gradient and moment.

Rajbhandari et al. 2020, "ZeRO", stage 3; Zhao et al. 2023, "PyTorch FSDP". A block's weights are gathered when it
computes: a step sends half as much again as with `ddp`, and memory for weights falls with the number of ranks.
"""

import lightning
import torch.distributed as dist
from lightning.pytorch.strategies import ModelParallelStrategy

from stages.training.sharding import shard


def lightning_strategy() -> ModelParallelStrategy:
    return ModelParallelStrategy(data_parallel_size=dist.get_world_size(), tensor_parallel_size=1)


def needs_rehearsal(world_size: int) -> bool:
    return False  # the groups of weights are fixed before the first pass


def shard_model(training: lightning.LightningModule) -> None:
    mesh = training.device_mesh
    assert mesh is not None, "Lightning's strategy has made it"
    shard(training.model, mesh["data_parallel"])
