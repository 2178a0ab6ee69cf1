"""DeepSpeed's ZeRO stage 3: each rank keeps its part of every weight, gradient and moment, as with `fsdp2`."""

from stages.training.zero import ZeRO, for_engine, shard_model, validation_nats, whole_state

__all__ = ["for_engine", "lightning_strategy", "needs_rehearsal", "shard_model", "validation_nats", "whole_state"]


def lightning_strategy() -> ZeRO:
    return ZeRO(stage=3)


def needs_rehearsal(world_size: int) -> bool:
    return False
