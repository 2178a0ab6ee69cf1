"""Which parts of a model the time of a forward pass goes into, on CPU.

Each part's forward is timed where the model calls it. On a GPU a call returns before its kernels ran, so not there.
"""

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
from torch import nn

PARTS = ("embedding", "attention", "mlp", "norms", "head")  # a mixture of experts counts as the MLP of its block
REST = "rest"  # residual sums, rotary tables, Python between the calls


def modules_of(model: Any) -> dict[str, list[nn.Module]]:
    """The modules of each part, none inside another."""
    blocks = list(model.blocks)
    return {
        "embedding": [model.embedding],
        "attention": [block.attention for block in blocks],
        "mlp": [block.mlp for block in blocks],
        "norms": [model.norm, *(norm for block in blocks for norm in (block.attention_norm, block.mlp_norm))],
        "head": [model.head],
    }


def seconds_by_part(model: Any, action: Callable[[], object], repetitions: int) -> dict[str, float]:
    """Median seconds that `action`, which runs the model, spends in each part, and in the rest."""
    action()  # warms up
    rows = []
    for _ in range(repetitions):
        with timed(model) as spent:
            start = time.perf_counter()
            action()
            whole = time.perf_counter() - start
        rows.append([*spent.values(), whole - sum(spent.values())])
    return dict(zip([*PARTS, REST], np.median(rows, axis=0).tolist(), strict=True))


@contextmanager
def timed(model: Any) -> Iterator[dict[str, float]]:
    """The parts' forwards with a clock, and as they were afterwards."""
    spent = dict.fromkeys(PARTS, 0.0)

    def clocked(part, forward):
        def run(*arguments, **named):
            start = time.perf_counter()
            try:
                return forward(*arguments, **named)
            finally:
                spent[part] += time.perf_counter() - start

        return run

    parts = modules_of(model)
    try:
        for part, modules in parts.items():
            for module in modules:
                module.forward = clocked(part, module.forward)
        yield spent
    finally:
        for modules in parts.values():
            for module in modules:
                module.__dict__.pop("forward", None)
