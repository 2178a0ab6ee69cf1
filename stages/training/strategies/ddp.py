"""Distributed data parallel: every rank holds the model and averages its gradients with the others."""

from lightning.pytorch.strategies import DDPStrategy


def lightning_strategy() -> DDPStrategy:
    return DDPStrategy(broadcast_buffers=False, gradient_as_bucket_view=True)


def needs_rehearsal(world_size: int) -> bool:
    """Does the first pass of a process sum gradients in another order than those that follow?

    DDP lays its buckets out anew after the first backward pass, and where three ranks or more add up, the order of
    summing depends on an element's place in its bucket. A resumed run would differ from an uninterrupted one by that
    first pass: so each makes one that it throws away.
    """
    return world_size > 2
