"""Spares a rank the import of torchmetrics, of which Lightning needs one class, for values logged by `self.log`.

torchmetrics brings scipy, matplotlib and transformers with it. Measured on two busy cores, three starts each: torch and
Lightning take 8.5, 8.8 and 9.4 s to import without it, 12.1, 14.6 and 18.4 s with it (processor time 3.7 s and 7.5 s),
in every rank of every training stage. `self.log` works with this class; where callbacks or loggers of conf/ are chosen,
which may use torchmetrics themselves, a rank imports the real one (stages/training/rank.py).
"""

import types
from typing import Any


class Metric:
    """As much of torchmetrics.Metric as Lightning needs for `self.log`: states, their update and their reset."""

    def __init__(self) -> None:
        self._defaults: dict[str, Any] = {}
        self._computed: Any = None
        self.update_called = False
        self.__dict__ |= {"update": self._wrap_update(self.update), "compute": self._wrap_compute(self.compute)}

    def add_state(self, name: str, default: Any, dist_reduce_fx: Any = None) -> None:
        self._defaults[name] = default
        setattr(self, name, default.clone())

    def _wrap_update(self, update: Any) -> Any:
        def updated(*args: Any, **kwargs: Any) -> None:
            self._computed, self.update_called = None, True
            update(*args, **kwargs)

        return updated

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self.forward(*args, **kwargs)

    def reset(self) -> None:
        self._computed, self.update_called = None, False
        for name, default in self._defaults.items():
            setattr(self, name, default.detach().clone().to(getattr(self, name).device))

    def update(self, *args: Any, **kwargs: Any) -> None:
        raise NotImplementedError

    def compute(self) -> Any:
        raise NotImplementedError

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        raise NotImplementedError

    def _wrap_compute(self, compute: Any) -> Any:
        raise NotImplementedError


def torchmetrics_stub() -> types.ModuleType:
    """A module with the names that Lightning imports, to be put into sys.modules before Lightning is imported."""
    stub = types.ModuleType("torchmetrics")
    stub.__dict__.update(__version__="1.0.0", Metric=Metric, MetricCollection=type("MetricCollection", (), {}))
    return stub
