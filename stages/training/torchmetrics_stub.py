"""Spares a rank the import of torchmetrics, which Lightning only needs for values that are logged through it.

torchmetrics brings scipy, matplotlib and transformers with it. Measured on two busy cores, three starts each: torch and
Lightning take 8.5, 8.8 and 9.4 s to import without it, 12.1, 14.6 and 18.4 s with it (processor time 3.7 s and 7.5 s),
in every rank of every training stage. Nothing is logged through Lightning here (`self.log`): a rank's figures go to
steps.jsonl (stages/training/callbacks.py).
"""

import types


def torchmetrics_stub() -> types.ModuleType:
    """A module with the names that Lightning imports, to be put into sys.modules before Lightning is imported."""
    stub = types.ModuleType("torchmetrics")
    names = {"Metric": type("Metric", (), {}), "MetricCollection": type("MetricCollection", (), {})}
    stub.__dict__.update(__version__="1.0.0", **names)
    return stub
