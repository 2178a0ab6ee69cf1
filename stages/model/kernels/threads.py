"""How many CPU threads an operation gets."""

import contextlib
from collections.abc import Iterator

import torch


@contextlib.contextmanager
def one_thread(device: torch.device) -> Iterator[None]:
    """With two CPU threads, run short operations on one: waiting for the second takes longer than it saves.

    With more threads, which was not measured, all take part.
    """
    if device.type != "cpu" or torch.get_num_threads() != 2:
        yield
        return
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(2)
