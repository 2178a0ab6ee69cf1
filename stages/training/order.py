"""In which order a fit has read its windows of text, as one number that does not depend on how many ranks read them.

The number is the sum, modulo 2^64, of a hash of (position, window) over all positions of the fit: each rank adds what
it read itself, and the ranks' sums add up to that of one rank that reads everything.
"""

import hashlib
from collections.abc import Iterable

from stages.data.shards import Windows

BYTES = 8
MODULUS = 256**BYTES


def order_of(first: int, windows: Iterable[int]) -> int:
    """Of windows read at the positions from `first` on."""
    keys = (f"{position}/{window}".encode() for position, window in enumerate(windows, first))
    return sum(int.from_bytes(hashlib.blake2b(key, digest_size=BYTES).digest(), "big") for key in keys) % MODULUS


def order_of_one_rank(windows: Windows, batches: int, batch_sequences: int) -> int:
    """Of so many batches, read by one rank from the first to the last."""
    every = (windows.indices(number, 0, 1, batch_sequences) for number in range(batches))
    return order_of(0, (window for batch in every for window in batch))


def as_numbers(order: int) -> list[float]:
    """One per byte: the ranks add them up in float32, exact for 65,536 ranks."""
    return [float(byte) for byte in order.to_bytes(BYTES, "big")]


def from_numbers(numbers: list[float]) -> int:
    """The inverse, of numbers that may exceed a byte."""
    return sum(int(number) * 256**place for place, number in enumerate(reversed(numbers))) % MODULUS
