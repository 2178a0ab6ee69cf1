"""Moving to another provider: bytes that leave, what their egress costs, how long the link needs."""

from typing import Any

Number = Any  # a float, or a quantity with a unit

BYTES_PER_GIGABYTE = 1e9


def moved_bytes(tokens: Number, bytes_per_token: Number, checkpoint_bytes: Number) -> Number:
    """The corpus and one checkpoint: what a run needs to continue elsewhere."""
    return tokens * bytes_per_token + checkpoint_bytes


def egress_dollars(moved: Number, dollars_per_gigabyte: Number) -> Number:
    """Providers charge by the gigabyte (10^9 bytes) that leaves them."""
    return moved / BYTES_PER_GIGABYTE * dollars_per_gigabyte


def transfer_seconds(moved: Number, bytes_per_second: Number) -> Number:
    """At the speed of the slowest link between the two places."""
    return moved / bytes_per_second


def idle_dollars(seconds: Number, chips: int, dollars_per_chip_hour: Number) -> Number:
    """What chips cost that are paid for while they wait for the transfer."""
    return seconds / 3600 * chips * dollars_per_chip_hour
