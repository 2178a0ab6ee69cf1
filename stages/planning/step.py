"""Seconds of a training step on other machines, predicted from a measured, smaller run (the anchor).

    step = (m + bubble) u (1 + straggler) + exposed

u is a chip's time for one micro-batch and m their number in a step. u comes from the anchor: the same equation with
the anchor's layout is solved for it, so that kernels, recomputation and framework need no model. What changes with the
layout and the number of chips is computed: idle pipeline stages, collectives over the links, the slowest of n chips.
"""

import math
from dataclasses import dataclass
from typing import Annotated

from pydantic import Field, model_validator

from stages.files.artifacts import ROOT, Refusal
from stages.planning.chips import Chip
from stages.planning.collectives import hierarchical_all_reduce_parts
from stages.planning.compute import routed_parameters, training_flops_per_token
from stages.planning.ledgers import Row, SourcedRow, load_ledger, row_of
from stages.planning.parallelism import (
    data_parallel_bytes_per_parameter,
    moe_wire_bytes_per_token,
    pipeline_bubble_micro_batches,
    pipeline_wire_bytes,
    tensor_parallel_wire_bytes,
)

FITTED = ROOT / "conf/plan/fitted.yaml"
BFLOAT16_BYTES = 2
SLOW_BYTES_PER_SECOND = 20e9  # of one chip between fast domains

Count = Annotated[int, Field(ge=1, le=2**40)]
Size = Annotated[float, Field(gt=0, le=1e18)]


class Model(SourcedRow):
    """What is published of a model's shape; null is unknown."""

    name: str
    total_parameters: Size | None = None
    active_parameters: Size | None = None
    layers: Count | None = None
    width: Count | None = None
    vocabulary: Count | None = None
    experts: Count | None = None  # routed, in a layer; null for a dense model
    experts_per_token: Count | None = None
    source: str | None = None

    @model_validator(mode="after")
    def _fits(self):
        if (self.active_parameters or 0) > (self.total_parameters or math.inf):
            raise ValueError(
                f"active_parameters = {self.active_parameters:g}: more than total_parameters"
                f" ({self.total_parameters:g}); swap or correct them"
            )
        if (self.experts_per_token or 0) > (self.experts or math.inf):
            raise ValueError(f"experts_per_token = {self.experts_per_token}: must be at most experts ({self.experts})")
        if self.routed_parameters > (self.total_parameters or math.inf):
            raise ValueError(
                f"active_parameters = {self.active_parameters:g}: a token passes through {self.experts_per_token} of"
                f" {self.experts} experts, so at least through that share of total_parameters; correct one of them"
            )
        return self

    @property
    def routed_parameters(self) -> float:
        if not self.experts or not self.experts_per_token or self.experts_per_token == self.experts:
            return 0.0
        if not self.total_parameters or not self.active_parameters:
            return 0.0
        return routed_parameters(self.total_parameters, self.active_parameters, self.experts, self.experts_per_token)

    def flops_per_token(self, sequence_tokens: int) -> float:
        """Model FLOPs of training; without attention where layers or width are unknown."""
        assert self.active_parameters
        return training_flops_per_token(self.active_parameters, self.layers or 0, self.width or 0, sequence_tokens)


class Layout(Row):
    """How a run is spread over its chips, and its batch. Ranks are ordered tensor, context, data, pipeline."""

    tp: Count = 1  # tensor
    pp: Count = 1  # pipeline
    vp: Count = 1  # virtual pipeline stages of a chip
    cp: Count = 1  # context
    ep: Count = 1  # expert
    etp: Count = 1  # tensor ranks of an expert
    dp: Count = 1  # data
    zero: Annotated[int, Field(ge=0, le=3)] = 1
    global_batch_sequences: Count
    micro_batch_sequences: Count
    sequence_tokens: Count
    precision: str = "bf16"
    gradient_bytes: Annotated[float, Field(gt=0, le=8)] = 4.0  # an element of gradients on the wire
    overlapped: bool = True  # gradients travel while the backward pass computes

    @property
    def chips(self) -> int:
        return self.tp * self.pp * self.cp * self.dp

    @property
    def micro_batches(self) -> int:
        """Of one pipeline in a step."""
        return self.global_batch_sequences // (self.dp * self.micro_batch_sequences)

    @property
    def tokens_per_step(self) -> int:
        return self.global_batch_sequences * self.sequence_tokens


@dataclass(frozen=True)
class Anchor:
    """A measured run: the step's seconds, and where it ran."""

    step_seconds: float
    layout: Layout
    nodes: int
    model: Model | None = None  # null: the model that is predicted
    chip: Chip | None = None  # null: the chip that is predicted


class Fitted(Row):
    """The few numbers that are fitted to published points; `low` and `high` bound 80% of the errors they leave."""

    exposed_share_of_fast_links: Annotated[float, Field(ge=0, le=10)]  # of traffic that no computation hides
    exposed_share_of_slow_links: Annotated[float, Field(ge=0, le=10)]
    straggler_share: Annotated[float, Field(ge=0, le=1)]  # slowdown of compute for each e-fold of chips
    low_share: Annotated[float, Field(ge=0, le=10)]  # of tokens per second
    high_share: Annotated[float, Field(ge=0, le=10)]


@dataclass(frozen=True)
class Step:
    """A predicted step. The four parts add up to `step_seconds`."""

    step_seconds: float
    compute_seconds: float
    bubble_seconds: float
    exposed_seconds: float
    straggler_seconds: float
    tokens_per_second: float
    low: float  # tokens per second
    high: float


def load_fitted() -> Fitted:
    """The numbers fitted to the whole registry; a test compares the file with a new fit."""
    return row_of(Fitted, load_ledger(FITTED), str(FITTED.relative_to(ROOT)))


def predict(model: Model, layout: Layout, chip: Chip, nodes: int, anchor: Anchor, fitted: Fitted | None = None) -> Step:
    """The step of `model` in this layout on `nodes` nodes of `chip`, from the anchor's measured step."""
    fitted = fitted or load_fitted()
    was_model, was_chip = anchor.model or model, anchor.chip or chip
    refuse_unless_it_fits(layout, chip, nodes)
    refuse_unless_it_fits(anchor.layout, was_chip, anchor.nodes)
    scale = _flops(model, layout) / _flops(was_model, anchor.layout)
    scale *= was_chip.peak(anchor.layout.precision) / chip.peak(layout.precision)
    was_unit = _measured_unit_seconds(was_model, was_chip, anchor, fitted)
    was_traffic = micro_batch_traffic_seconds(was_model, anchor.layout, was_chip)
    if was_traffic < was_unit:
        unit = (was_unit - was_traffic) * scale + micro_batch_traffic_seconds(model, layout, chip)
    else:  # the measured time has no room for it: it was hidden
        unit = was_unit * scale
    compute = layout.micro_batches * unit
    bubble = pipeline_bubble_micro_batches(layout.pp, layout.vp) * unit
    straggler = (compute + bubble) * straggler_growth(layout.chips) * fitted.straggler_share
    exposed = exposed_seconds(model, layout, chip, fitted)
    step = compute + bubble + straggler + exposed
    rate = layout.tokens_per_step / step
    return Step(
        step_seconds=step,
        compute_seconds=compute,
        bubble_seconds=bubble,
        exposed_seconds=exposed,
        straggler_seconds=straggler,
        tokens_per_second=rate,
        low=rate * (1 - fitted.low_share),
        high=rate * (1 + fitted.high_share),
    )


def refuse_unless_it_fits(layout: Layout, chip: Chip, nodes: int) -> None:
    """The layout must multiply to the chips of the nodes, and the batch must divide among the data ranks."""
    chips = nodes * chip.chips_per_node
    if nodes < 1:
        raise Refusal(f"nodes = {nodes}: must be at least 1")
    if layout.chips != chips:
        raise Refusal(
            f"tp {layout.tp} x pp {layout.pp} x cp {layout.cp} x dp {layout.dp} = {layout.chips} chips, but {nodes}"
            f" nodes of {chip.chips_per_node} {chip.name} have {chips}: change the layout or the nodes"
        )
    at_once = layout.dp * layout.micro_batch_sequences
    if layout.global_batch_sequences % at_once:
        raise Refusal(
            f"global_batch_sequences = {layout.global_batch_sequences}: must be a multiple of dp x"
            f" micro_batch_sequences ({at_once}): change the batch or the layout"
        )
    used = {"intra_bytes_per_second": min(chips, chip.fast_domain_chips) > 1} if chips > 1 else {}
    used |= {"inter_bytes_per_second": chips > chip.fast_domain_chips}
    unknown = [name for name, needed in used.items() if needed and getattr(chip, name) is None]
    if unknown and not chip.all_reduce_bytes_per_second:
        raise Refusal(f"chip {chip.name}: {unknown[0]} is not known: write it in conf/plan/chips.yaml or in the row")


def _measured_unit_seconds(model, chip, anchor, fitted):
    """A chip's time for one micro-batch: the step's equation solved for it."""
    layout = anchor.layout
    rounds = layout.micro_batches + pipeline_bubble_micro_batches(layout.pp, layout.vp)
    slower = 1 + straggler_growth(layout.chips) * fitted.straggler_share
    left = anchor.step_seconds - exposed_seconds(model, layout, chip, fitted)
    if left <= 0:
        raise Refusal(
            f"the anchor's step of {anchor.step_seconds:g} s is shorter than its traffic over {chip.name}'s links"
            " alone: check its batch, its layout and the links"
        )
    return left / (rounds * slower)


def _flops(model, layout):
    """Of one chip for one micro-batch."""
    tokens = layout.micro_batch_sequences * layout.sequence_tokens
    return model.flops_per_token(layout.sequence_tokens) * tokens / (layout.tp * layout.pp * layout.cp)


def straggler_growth(chips: int) -> float:
    """Expected excess of the slowest of n chips in units of the jitter's scale: ln n.

    The maximum of n exponential delays has the mean H_n, about ln n (Dean and Barroso 2013, "The Tail at Scale", give
    the effect; the formula is that of order statistics).
    """
    return math.log(chips)


def exposed_seconds(model: Model, layout: Layout, chip: Chip, fitted: Fitted) -> float:
    """Seconds of a step that the chip waits for gradients, and for activations that cross slow links."""
    inside, across = gradient_traffic_seconds(model, layout, chip)
    if not layout.overlapped:
        return inside + across
    if not has_slow_links(chip):
        return fitted.exposed_share_of_fast_links * (inside + across)
    across += layout.micro_batches * pipeline_traffic_seconds(model, layout, chip)
    return fitted.exposed_share_of_fast_links * inside + fitted.exposed_share_of_slow_links * across


def has_slow_links(chip: Chip) -> bool:
    """Whether the network between fast domains gives a chip less than 20 GB/s (160 Gb/s).

    Between 12.5 GB/s (A3 High, TPU pods) and 25 GB/s (DGX A100) no system of the registry lies. Above it, published
    runs hide their gradients' traffic; below it, they do not.
    """
    return (chip.inter_bytes_per_second or math.inf) < SLOW_BYTES_PER_SECOND


def gradient_traffic_seconds(model: Model, layout: Layout, chip: Chip) -> tuple[float, float]:
    """What data parallelism moves in a step, at full speed: seconds inside fast domains, seconds between them.

    Experts are replicated less often: over all chips of a pipeline stage divided by their own ranks.
    """
    assert model.total_parameters
    routed = model.routed_parameters
    dense = (model.total_parameters - routed) / (layout.tp * layout.pp)
    own = layout.ep * layout.etp
    of_dense = _replicas_seconds(dense, layout.dp * layout.cp, layout.tp, layout, chip)
    of_experts = _replicas_seconds(routed / (own * layout.pp), layout.chips // layout.pp // own, own, layout, chip)
    return of_dense[0] + of_experts[0], of_dense[1] + of_experts[1]


def _replicas_seconds(parameters, ranks, stride, layout, chip):
    """`ranks` replicas of a chip's parameters, `stride` chips apart, made equal: seconds inside, seconds across."""
    if ranks <= 1 or not parameters:
        return 0.0, 0.0
    if chip.all_reduce_bytes_per_second:
        return 0.0, parameters * layout.gradient_bytes / chip.all_reduce_bytes_per_second
    each = data_parallel_bytes_per_parameter(layout.zero, layout.micro_batches, BFLOAT16_BYTES, layout.gradient_bytes)
    size = parameters * each / 2  # an all-reduce moves each byte twice
    inside = min(ranks, max(1, chip.fast_domain_chips // stride))
    domains = math.ceil(ranks / inside)
    return hierarchical_all_reduce_parts(
        size,
        domains,
        inside,
        chip.intra_bytes_per_second,
        chip.inter_bytes_per_second,
        chip.intra_latency_seconds,
        chip.inter_latency_seconds,
    )


def pipeline_traffic_seconds(model: Model, layout: Layout, chip: Chip) -> float:
    """Activations and their gradients of one micro-batch that a chip sends to the stages beside its own."""
    if layout.pp == 1 or not model.width:
        return 0.0
    tokens = layout.micro_batch_sequences * layout.sequence_tokens / (layout.cp * layout.tp)
    return pipeline_wire_bytes(tokens, model.width, layout.vp, BFLOAT16_BYTES) / _bandwidth(chip, layout.chips)


def micro_batch_traffic_seconds(model: Model, layout: Layout, chip: Chip) -> float:
    """Tensor and expert parallelism inside one micro-batch of one chip; what of it is hidden, the anchor tells."""
    if not model.layers or not model.width:
        return 0.0
    layers = model.layers / layout.pp
    tokens = layout.micro_batch_sequences * layout.sequence_tokens / layout.cp
    seconds = 0.0
    if layout.tp > 1:
        sent = tensor_parallel_wire_bytes(tokens, model.width, layers, layout.tp, BFLOAT16_BYTES)
        seconds += sent / _bandwidth(chip, layout.tp)
    if layout.ep > 1 and model.experts_per_token:
        each = moe_wire_bytes_per_token(
            model.width, layers, model.experts_per_token, layout.ep, BFLOAT16_BYTES, BFLOAT16_BYTES
        )
        seconds += each * tokens / layout.tp / _bandwidth(chip, layout.ep * layout.etp)
    return seconds


def _bandwidth(chip, ranks):
    return chip.intra_bytes_per_second if ranks <= chip.fast_domain_chips else chip.inter_bytes_per_second
