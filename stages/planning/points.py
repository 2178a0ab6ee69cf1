"""Published measurements of training runs: conf/plan/points/*.yaml, one row a measurement.

    - {id: a, set: s, publisher: p, model: Llama-3.1-8B, chip: H100, chips: 64, nodes: 8, precision: bf16,
       layout: {tp: 1, pp: 1, dp: 64, zero: 3}, global_batch_sequences: 128, micro_batch_sequences: 2,
       sequence_tokens: 8192, metric: tokens_per_second_per_chip, value: 6600, anchor: b, source: ..., date: 2025-01-31}

A file is a list of rows. What is not published is null or left out. `anchor` is the id of the smaller run that the row
is predicted from. `model` is a name of conf/plan/models.yaml or a mapping of the same fields.
"""

import datetime
import difflib
import os
from collections.abc import Iterable
from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field, model_validator

from stages.files.artifacts import ROOT, Refusal
from stages.planning.chips import Chip, Rate, load_chips
from stages.planning.ledgers import Row, load_ledger, row_of
from stages.planning.step import Count, Layout, Model
from stages.settings.reading import shown

POINTS = ROOT / "conf/plan/points"
MODELS = ROOT / "conf/plan/models.yaml"

Word = Annotated[str, Field(min_length=1)]
Metric = Literal[
    "step_seconds",
    "tokens_per_second",
    "tokens_per_second_per_chip",
    "tflops_per_chip",
    "mfu_percent",
    "efficiency_percent",  # of the anchor's throughput per chip
]


class Spread(Row):
    """Ranks of each kind of parallelism; null: not published. dp follows from the others and the chips."""

    tp: Count | None = 1
    pp: Count | None = 1
    vp: Count | None = None
    cp: Count | None = 1
    ep: Count | None = 1
    etp: Count | None = 1
    dp: Count | None = None
    zero: Annotated[int, Field(ge=0, le=3)] | None = 1


class Links(Row):
    """Where the system differs from the chip's usual one, or was measured. Bytes per second of one chip, one way."""

    intra_bytes_per_second: Rate | None = None
    inter_bytes_per_second: Rate | None = None
    all_reduce_bytes_per_second: Rate | None = None
    overlapped: bool = True


class Point(Row):
    """One published measurement. `model` and `chip` are names in the file and whole here, links applied."""

    id: Word
    set: Word
    publisher: Word
    model: Model
    chip: Chip
    chips: Count
    nodes: Count
    chips_per_node: Count | None = None  # null: the chip's usual system
    fast_domain_chips: Count | None = None
    links: Links | None = None
    precision: Word
    layout: Spread | None = None
    global_batch_sequences: Count | None = None
    micro_batch_sequences: Count | None = None
    sequence_tokens: Count | None = None
    gradient_bytes: Annotated[float, Field(gt=0, le=8)] = 4.0
    metric: Metric
    value: Annotated[float, Field(ge=1e-18, le=1e18)]
    anchor: Word | None = None
    stack: Word | None = None
    source: Word
    date: datetime.date | None = None
    note: Word | None = None

    @model_validator(mode="after")
    def _fits(self):
        if self.nodes * self.chip.chips_per_node != self.chips:
            raise ValueError(
                f"chips = {self.chips}: {self.nodes} nodes of {self.chip.chips_per_node} have"
                f" {self.nodes * self.chip.chips_per_node}; change chips, nodes or chips_per_node"
            )
        if self.precision not in self.chip.peak_flops_per_second:
            known = ", ".join(self.chip.peak_flops_per_second)
            raise ValueError(f"precision = {shown(self.precision)}: {self.chip.name} has a peak for {known}")
        spread = self.layout
        if spread and spread.tp and spread.pp and spread.cp and spread.ep and spread.etp:
            others = spread.tp * spread.pp * spread.cp
            ranks = others * (spread.dp or max(1, self.chips // others))
            if ranks != self.chips:
                raise ValueError(
                    f"layout: tp {spread.tp} x pp {spread.pp} x cp {spread.cp} x dp {spread.dp or 'free'} makes {ranks}"
                    f" ranks on {self.chips} chips; change the layout or chips"
                )
            at_once = self.chips // others * (self.micro_batch_sequences or 1)
            if self.global_batch_sequences and self.global_batch_sequences % at_once:
                raise ValueError(
                    f"global_batch_sequences = {self.global_batch_sequences}: must be a multiple of dp x"
                    f" micro_batch_sequences ({at_once}); change the batch or the layout"
                )
            if self.chips // spread.pp % (spread.ep * spread.etp):
                raise ValueError(
                    f"layout: ep {spread.ep} x etp {spread.etp} does not divide the {self.chips // spread.pp} chips of"
                    " a pipeline stage; change ep or etp"
                )
        return self

    @property
    def missing(self) -> list[str]:
        """Fields that a prediction needs and that are not published."""
        spread, model, chip = self.layout, self.model, self.chip
        needed = {
            "model.total_parameters": model.total_parameters,
            "model.active_parameters": model.active_parameters,
            "layout": spread,
            "global_batch_sequences": self.global_batch_sequences,
        }
        if self.metric != "step_seconds" or (spread and (spread.tp != 1 or spread.ep != 1)):
            needed["sequence_tokens"] = self.sequence_tokens
        for name in ("tp", "pp", "cp", "ep", "etp") if spread else ():
            needed[f"layout.{name}"] = getattr(spread, name)
        if spread and (spread.pp or 1) > 1:
            needed |= {"layout.vp": spread.vp, "micro_batch_sequences": self.micro_batch_sequences}
        if model.experts:
            needed["model.experts_per_token"] = model.experts_per_token
        if not chip.all_reduce_bytes_per_second:
            if self.chips > 1:
                needed["links.intra_bytes_per_second"] = chip.intra_bytes_per_second
            if self.chips > chip.fast_domain_chips:
                needed["links.inter_bytes_per_second"] = chip.inter_bytes_per_second
        return [name for name, value in needed.items() if value is None]

    @property
    def whole_layout(self) -> Layout:
        """The layout and batch, where nothing is missing. A batch without micro-batches is computed in one piece."""
        spread = self.layout
        assert spread and spread.tp and spread.pp and spread.cp and spread.ep and spread.etp
        assert self.global_batch_sequences
        data_ranks = self.chips // (spread.tp * spread.pp * spread.cp)
        return Layout(
            tp=spread.tp,
            pp=spread.pp,
            vp=spread.vp or 1,
            cp=spread.cp,
            ep=spread.ep,
            etp=spread.etp,
            dp=data_ranks,
            zero=1 if spread.zero is None else spread.zero,
            global_batch_sequences=self.global_batch_sequences,
            micro_batch_sequences=self.micro_batch_sequences or max(1, self.global_batch_sequences // data_ranks),
            sequence_tokens=self.sequence_tokens or 1,  # unknown only where it divides out: sequences count as tokens
            precision=self.precision,
            gradient_bytes=self.gradient_bytes,
            overlapped=self.links.overlapped if self.links else True,
        )

    @property
    def tokens_per_step(self) -> int:
        assert self.global_batch_sequences and self.sequence_tokens
        return self.global_batch_sequences * self.sequence_tokens

    def step_seconds(self) -> float | None:
        """Of the published value; null where it is only a ratio."""
        return self.value if self.metric == "step_seconds" else self._convert(self.value)

    def value_at(self, step_seconds: float) -> float | None:
        """What the row's metric would be at this step time; the inverse of `step_seconds`."""
        return step_seconds if self.metric == "step_seconds" else self._convert(step_seconds)

    def _convert(self, number):
        """A rate into seconds or seconds into the rate: both are tokens over the other."""
        if self.metric == "efficiency_percent":
            return None
        total = self.tokens_per_step / number
        if self.metric == "tokens_per_second":
            return total
        each = total / self.chips
        if self.metric == "tokens_per_second_per_chip":
            return each
        assert self.sequence_tokens
        flops = each * self.model.flops_per_token(self.sequence_tokens)
        return flops / 1e12 if self.metric == "tflops_per_chip" else 100 * flops / self.chip.peak(self.precision)


def load_points(paths: str | Path | Iterable[str | Path] = POINTS) -> list[Point]:
    """The rows of files, and of the files of folders; ids are unique and anchors lead to a row without one.

    An anchor may also be a row of the registry.
    """
    chips = load_chips()
    models = load_models()
    found: dict[str, Point] = {}
    places: dict[str, str] = {}
    for path in _files([paths] if isinstance(paths, (str, Path)) else paths):
        rows = load_ledger(path)
        if not isinstance(rows, list) or not rows:
            raise Refusal(f"{path}: must be a list of rows; write `- {{id: ..., set: ..., ...}}`")
        for number, row in enumerate(rows, start=1):
            place = f"{path}: row {row['id'] if isinstance(row, dict) and row.get('id') else number}"
            point = row_of(Point, _resolved(row, chips, models, place), place)
            if point.id in found:
                raise Refusal(f"{place}: the id stands in {places[point.id]} too; give each row its own")
            found[point.id], places[point.id] = point, place
    if not found:
        raise Refusal(f"{paths}: has no file with rows; name a file of rows, or a folder of *.yaml")
    known = found
    if any(point.anchor is not None and point.anchor not in found for point in found.values()) and paths != POINTS:
        known = {point.id: point for point in load_points(POINTS)} | found
    for point in found.values():
        _refuse_bad_anchor(point, known, places[point.id])
    return list(found.values())


def load_models() -> dict[str, Model]:
    """Published shapes of models by name."""
    rows = load_ledger(MODELS)
    return {name: row_of(Model, {"name": name} | row, f"{MODELS}: {name}") for name, row in rows.items()}


def _files(paths):
    for path in map(Path, paths):
        yield from sorted(path.glob("*.yaml")) if os.path.isdir(path) else [path]  # False for a name that is too long


def _resolved(row, chips, models, place):
    """The row with its chip and model whole; other mistakes are left to the types."""
    if not isinstance(row, dict):
        return row
    row = dict(row)
    if isinstance(row.get("model"), str):
        row["model"] = _known(row["model"], models, "model", f"{place}", "conf/plan/models.yaml, or write its fields")
    elif isinstance(row.get("model"), dict):
        row["model"] = row_of(Model, row["model"], f"{place}: model")
    if isinstance(row.get("chip"), str):
        chip = _known(row["chip"], chips, "chip", place, "conf/plan/chips.yaml")
        links = row_of(Links, row.get("links") or {}, f"{place}: links")
        nodes, count = row.get("nodes"), row.get("chips")
        own = {name: value for name, value in links.model_dump(exclude={"overlapped"}).items() if value is not None}
        own |= {name: row[name] for name in ("chips_per_node", "fast_domain_chips") if _is_count(row.get(name))}
        if "chips_per_node" not in own and nodes == 1 and _is_count(count) and count < chip.chips_per_node:
            own["chips_per_node"] = count  # a part of a node
        row["chip"] = chip.model_copy(update=own)
    return row


def _is_count(value):
    return isinstance(value, int) and not isinstance(value, bool) and value >= 1


def _known(name, known, field, place, where):
    if name not in known:
        close = difflib.get_close_matches(name, known, n=1)
        hint = f"did you mean {close[0]}?" if close else f"there are {', '.join(known)}"
        raise Refusal(f"{place}: {field} = {shown(name)}: not in {where}; {hint}")
    return known[name]


def _refuse_bad_anchor(point, found, place):
    seen = [point.id]
    while point.anchor is not None:
        if point.anchor not in found:
            raise Refusal(f"{place}: anchor = {shown(point.anchor)}: no row has this id; add the row or leave it out")
        point = found[point.anchor]
        if point.id in seen:
            raise Refusal(f"{place}: anchor: circular ({' -> '.join([*seen, point.id])}); one row must have none")
        seen.append(point.id)
