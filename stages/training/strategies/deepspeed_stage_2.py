"""DeepSpeed's ZeRO stage 2: each rank holds the weights and keeps its part of the gradients and moments."""

from stages.training.zero import ZeRO, for_engine, shard_model, validation_nats, whole_state

__all__ = ["for_engine", "lightning_strategy", "needs_rehearsal", "shard_model", "validation_nats", "whole_state"]


def lightning_strategy() -> ZeRO:
    return ZeRO(stage=2)


def needs_rehearsal(world_size: int) -> bool:
    return False
