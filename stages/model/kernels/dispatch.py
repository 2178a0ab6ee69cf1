"""Which implementation of an operation runs: chosen by device, dtype and size of its operands, nowhere else.

    top_experts = Operation("top_experts")

    @top_experts.kernel(when=lambda score_NE, per_token: score_NE.is_cuda)
    def by_sorting(score_NE, per_token): ...

    @top_experts.kernel()  # for all other operands
    def by_maxima(score_NE, per_token): ...

`top_experts(score_NE, 2)` runs the first kernel whose condition holds, and `top_experts["by_maxima"]` is one by its
name. All kernels of an operation give the same result, up to rounding.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

Compute = Callable[..., Any]


class Kernel(NamedTuple):
    name: str
    when: Callable[..., bool] | None  # is asked with the operands, before each call: it must be cheap. None: always
    compute: Compute


class Operation:
    def __init__(self, name: str):
        self.name = name
        self.kernels: list[Kernel] = []

    def kernel(self, when: Callable[..., bool] | None = None, first: bool = False) -> Callable[[Compute], Compute]:
        """Adds the decorated function as a kernel: asked after those that are there, or `first`."""

        def add(compute: Compute) -> Compute:
            self.kernels.insert(0 if first else len(self.kernels), Kernel(compute.__name__, when, compute))
            return compute

        return add

    def __call__(self, *operands: Any) -> Any:
        for _, when, compute in self.kernels:  # `chosen` written out: decoding calls this some fifteen times a layer
            if when is None or when(*operands):
                return compute(*operands)
        raise NotImplementedError(f"{self.name}: no kernel for these operands")

    def chosen(self, *operands: Any) -> Kernel:
        for kernel in self.kernels:
            if kernel.when is None or kernel.when(*operands):
                return kernel
        raise NotImplementedError(f"{self.name}: no kernel for these operands")

    def __getitem__(self, name: str) -> Compute:
        return {kernel.name: kernel.compute for kernel in self.kernels}[name]
