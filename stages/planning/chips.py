"""What the planner knows of a chip and its links: conf/plan/chips.yaml, each row with its source."""

from pathlib import Path
from typing import Annotated

from pydantic import Field

from stages.files.artifacts import ROOT, Refusal
from stages.planning.ledgers import SourcedRow, load_ledger, row_of

CHIPS = ROOT / "conf/plan/chips.yaml"

Rate = Annotated[float, Field(gt=0, le=1e21)]
Seconds = Annotated[float, Field(ge=0, le=1e9)]
Number = Annotated[int, Field(ge=1, le=2**40)]


class Chip(SourcedRow):
    """One chip in its usual system. Bandwidths are those of one chip, in one direction."""

    name: str
    peak_flops_per_second: dict[str, Rate]  # dense, by precision
    memory_bytes: Rate | None
    chips_per_node: Number
    fast_domain_chips: Number  # chips that the intra link joins: a node, an NVLink rack, a TPU slice
    intra_bytes_per_second: Rate | None
    inter_bytes_per_second: Rate | None
    intra_latency_seconds: Seconds
    inter_latency_seconds: Seconds
    all_reduce_bytes_per_second: Rate | None = None  # measured: gradient bytes of a chip over seconds, all links in it
    source: str

    def peak(self, precision: str) -> float:
        """Dense FLOP/s at this precision; FP8 formats count as fp8."""
        if precision not in self.peak_flops_per_second:
            known = ", ".join(self.peak_flops_per_second)
            raise Refusal(f"chip {self.name}: no peak for precision {precision}; there are {known}")
        return self.peak_flops_per_second[precision]


def load_chips(path: str | Path = CHIPS) -> dict[str, Chip]:
    """The chips of a file by name; it is a mapping of names to fields."""
    rows = load_ledger(path)
    if not isinstance(rows, dict):
        raise Refusal(f"{path}: must map the name of each chip to its fields")
    return {
        str(name): row_of(Chip, {"name": str(name)} | _fields(row), f"{path}: {name}") for name, row in rows.items()
    }


def _fields(row):
    return row if isinstance(row, dict) else {}
