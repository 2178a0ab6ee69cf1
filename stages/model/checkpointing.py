"""Activation checkpointing: less memory for a training step, paid with a second forward pass of some blocks.

A policy is applied from outside, to the blocks of a model that knows nothing of it:

    none               keep every activation that the backward pass wants
    every_k            recompute the first of every k blocks: every_1 all of them, every_4 one in four
    first_m            recompute the first m blocks
    all_but_last       recompute every block but the last: its backward pass comes first, while all else is
                       still kept, so recomputing it costs time and spares only the loss's temporaries
    attention_m        recompute the attention of the first m blocks, and keep the rest of them
    mlp_m              the same of their MLPs or mixtures of experts
    selective          keep what matrices, attention and top-k gave; recompute the elementwise rest

    with checkpointed(model, "every_2"):
        loss(model).backward()

`least_recomputation` chooses the policy that keeps within a budget of bytes.

Recomputing a router could send tokens elsewhere, were anything random or stateful: nothing is, and the tests
hold the gradients equal.
"""

import functools
import re
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

from stages.files.artifacts import Refusal
from stages.model.operations import ATTENTION_FORWARD, GROUPED_MATMUL, Counter

aten = torch.ops.aten
# Dear to compute, or a choice of experts. Matmuls into a given output (aten.mm.out, the experts' loop on CPU)
# cannot be kept by torch's selective checkpointing, which forbids writing to what it keeps: they run again.
KEPT_OPERATIONS = {
    aten.mm.default,
    aten.addmm.default,
    aten.bmm.default,
    aten.topk.default,
    *(kernel.default for kernel in ATTENTION_FORWARD + GROUPED_MATMUL),
}


MOST_DEPTHS = 6  # how many numbers m of blocks are tried for a budget in a deep model


def policies(every_blocks: tuple[int, ...], layers: int) -> list[str]:
    """The policies worth measuring: those that checkpoint a block at all."""
    every = [f"every_{k}" for k in every_blocks if k <= layers]
    return ["none", *every, "all_but_last", f"attention_{layers}", f"mlp_{layers}", "selective"]


def candidates(layers: int) -> list[str]:
    """The policies among which a budget chooses: for a deep model not every number of blocks."""
    depths = sorted({-(-layers * number // MOST_DEPTHS) for number in range(1, MOST_DEPTHS + 1)})
    return [f"{part}_{depth}" for part in ("first", "attention", "mlp") for depth in depths] + ["selective"]


@contextmanager
def checkpointed(model: nn.Module, policy: str, around: Callable = nullcontext) -> Iterator[None]:
    """The model's blocks under a policy, and as they were afterwards.

    Each block's forward, the repeated one too, runs inside `around()`.
    """
    kept = frozenset(KEPT_OPERATIONS) - getattr(model, "changed_in_place", frozenset())
    wrap, chosen = _wrapper(policy, kept), _chosen(policy, list(model.blocks))
    wrapped = [*model.blocks, *(part for part in chosen if part not in set(model.blocks))]
    try:
        for part in wrapped:
            original = _within(part.forward, around)
            part.forward = wrap(original) if part in chosen else original
        yield
    finally:
        for part in wrapped:
            part.__dict__.pop("forward", None)


def _chosen(policy: str, blocks: list) -> set[nn.Module]:
    """What is wrapped. Early blocks spare most: what they keep would live until the very end."""
    word, _, number = policy.rpartition("_")
    if word == "every":
        return set(blocks[:: int(number)])
    if word == "first":
        return set(blocks[: int(number)])
    if word in ("attention", "mlp"):
        return {getattr(block, word) for block in blocks[: int(number)]}
    return set(blocks[:-1] if policy == "all_but_last" else blocks)


def _within(function, around):
    def run(*arguments, **named):
        with around():
            return function(*arguments, **named)

    return run


def _wrapper(policy: str, kept: frozenset):
    if policy == "none":
        return lambda forward: forward
    # No randomness in a block: the generator's state need not be kept. Non-reentrant, as PyTorch advises.
    options: dict[str, Any] = {"use_reentrant": False, "preserve_rng_state": False}
    if policy == "selective":
        options["context_fn"] = functools.partial(
            create_selective_checkpoint_contexts, functools.partial(_keep_or_recompute, kept)
        )
    elif not re.fullmatch(r"(every|first|attention|mlp)_[1-9]\d*|all_but_last", policy):
        known = "none, every_<k>, first_<m>, attention_<m>, mlp_<m>, all_but_last or selective"
        raise ValueError(f"checkpointing policy {policy!r}: it must be {known}")
    return lambda forward: functools.partial(checkpoint, forward, **options)


def _keep_or_recompute(kept, context, operation, *arguments, **named):
    return CheckpointPolicy.MUST_SAVE if operation in kept else CheckpointPolicy.PREFER_RECOMPUTE


# ---- what a step keeps, computes and gives


class LiveBytes(TorchDispatchMode):
    """Bytes of the storages that the forward pass made and something still holds.

    `now`; `peak`, at most at any moment; `activations`, at most when the forward pass, a block of it, or its
    repetition has ended: by then its temporaries are gone and what lives is kept for the backward pass.
    On any device, by identity of storage: views and in-place results count once, parameters never. Only what
    is made inside `record` counts, which leaves the gradients and temporaries of the backward pass out.
    """

    def __init__(self, model: nn.Module):
        super().__init__()
        self.recording = 0
        self.now = self.peak = self.activations = 0
        self._known: dict[int, weakref.ref | None] = {}
        for tensor in [*model.parameters(), *model.buffers()]:
            self._known[tensor.untyped_storage()._cdata] = None

    @contextmanager
    def record(self):
        self.recording += 1
        try:
            yield
        finally:
            self.recording -= 1
            self.activations = max(self.activations, self.now)

    def __torch_dispatch__(self, function, types, arguments=(), named=None):
        result = function(*arguments, **(named or {}))
        if self.recording:
            for leaf in tree_leaves(result):
                if isinstance(leaf, Tensor):
                    self._meet(leaf.untyped_storage())
        return result

    def _meet(self, storage) -> None:
        key, size = storage._cdata, storage.nbytes()
        if key in self._known:
            return

        def gone(_):
            self.now -= size
            del self._known[key]

        self._known[key] = weakref.ref(storage, gone)
        self.now += size
        self.peak = max(self.peak, self.now)


def saved_bytes(model: nn.Module, loss_of: Callable[[], Tensor]) -> int:
    """Bytes of the storages that autograd saves for the backward pass, parameters apart, each once."""
    own = {tensor.untyped_storage()._cdata for tensor in [*model.parameters(), *model.buffers()]}
    sizes = {}

    def pack(tensor):
        storage = tensor.untyped_storage()
        if storage._cdata not in own:
            sizes[storage._cdata] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        loss = loss_of()
    del loss
    return sum(sizes.values())


class Step(NamedTuple):
    """One training step, looked at from inside. Bytes count what a recomputed block brings back to life."""

    activation_bytes: int  # kept for the backward pass, at most
    peak_bytes: int  # the same with the temporaries of forward passes
    forward_flops: int
    flops: int  # forward, repeated and backward
    gradients: list[Tensor]


def watched_step(model: nn.Module, policy: str, loss_of: Callable[[], Tensor]) -> Step:
    model.zero_grad(set_to_none=True)
    live = LiveBytes(model)
    with live, checkpointed(model, policy, around=live.record):
        with live.record():
            loss = loss_of()
        loss.backward()
    gradients = [torch.zeros_like(p) if p.grad is None else p.grad for p in model.parameters()]
    model.zero_grad(set_to_none=True)
    # Counted in a step of its own: the counter's hooks hold tensors, which would count as kept.
    with Counter() as counter, checkpointed(model, policy):
        loss = loss_of()
        forward_flops = counter.get_total_flops()
        loss.backward()
    model.zero_grad(set_to_none=True)
    return Step(live.activations, live.peak, forward_flops, counter.get_total_flops(), gradients)


def device_peak_bytes(model: nn.Module, policy: str, loss_of: Callable[[], Tensor]) -> int:
    """The CUDA allocator's peak of one training step, above what stood before it."""
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    with checkpointed(model, policy):
        loss_of().backward()
    torch.cuda.synchronize()
    model.zero_grad(set_to_none=True)
    return torch.cuda.max_memory_allocated() - before


def compare_policies(model: nn.Module, names: list[str], loss_of: Callable[[], Tensor]) -> list[dict]:
    """What each policy keeps, recomputes and changes, against none; nothing here is a timing."""
    plain = watched_step(model, "none", loss_of)
    rows = []
    for name in names:
        step = plain if name == "none" else watched_step(model, name, loss_of)
        rows.append(
            {
                "policy": name,
                "activation_bytes": step.activation_bytes,
                "peak_bytes": step.peak_bytes,
                "memory_saved": 1 - step.activation_bytes / plain.activation_bytes,
                "recomputed_flops_share": (step.flops - plain.flops) / plain.forward_flops,
                "gradients_equal": all(map(torch.equal, plain.gradients, step.gradients)),
            }
        )
    return rows


class Chosen(NamedTuple):
    """A policy, the bytes of activations that it keeps, and what it repeats as a share of a forward pass."""

    policy: str
    activation_bytes: int
    recomputed_flops_share: float


def least_recomputation(model: nn.Module, budget_bytes: int, loss_of: Callable[[], Tensor], where: str) -> Chosen:
    """The policy that repeats fewest operations among those that keep at most so many bytes of activations.

    All are counted on the step that `loss_of` gives; nothing is timed, so the choice is the same in every run. Refused
    with the fewest bytes that can be reached where none is enough; `where` is for the message.
    """
    plain = watched_step(model, "none", loss_of)
    if plain.activation_bytes <= budget_bytes:
        return Chosen("none", plain.activation_bytes, 0.0)
    found = []
    for policy in candidates(len(model.blocks)):
        step = watched_step(model, policy, loss_of)
        found.append(Chosen(policy, step.activation_bytes, (step.flops - plain.flops) / plain.forward_flops))
    fitting = [one for one in found if one.activation_bytes <= budget_bytes]
    if not fitting:
        least = min(one.activation_bytes for one in found)
        raise Refusal(
            f"trainer.activation_memory_bytes = {budget_bytes}: no checkpointing policy keeps so little for {where}: "
            f"set it to {least} at least, or lower batch_sequences or sequence_tokens"
        )
    return min(fitting, key=lambda one: (one.recomputed_flops_share, one.activation_bytes))
