"""The chunked distillation loss, forward and backward, against the plain one: time, peak of live tensors.

The plain one holds seven tensors of the size of the logits at once: the largest vocabulary gets fewer tokens, so that
it takes 3.8 GB at most.
"""

from collections.abc import Callable, Iterator
from functools import partial
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.peers import too_large
from benchmarks.table import Row
from benchmarks.timing import DEVICE, Action, Ratio, interleaved
from stages.model.checkpointing import LiveBytes
from stages.model.divergences import forward_kl
from stages.model.losses import DistillationLoss

TEMPERATURE, SOFT_WEIGHT = 2.0, 0.9
PLAIN_LOGITS = 7  # tensors [N, V] that the plain loss holds at once
SIZES = {4096: 4096, 32768: 4096, 131072: 1024}  # vocabulary -> tokens


class Inputs(NamedTuple):
    student_x_ND: nn.Parameter
    student_head_VD: nn.Parameter
    teacher_x_ND: Tensor
    teacher_head_VD: Tensor
    targets_N: Tensor


def some_inputs(tokens: int, vocab: int, student_width: int, teacher_width: int) -> Inputs:
    generator = torch.Generator().manual_seed(0)

    def normal(*size: int, scale: float = 1.0) -> Tensor:
        return (torch.randn(*size, generator=generator) * scale).to(DEVICE)

    return Inputs(
        nn.Parameter(normal(tokens, student_width)),
        nn.Parameter(normal(vocab, student_width, scale=student_width**-0.5)),
        normal(tokens, teacher_width),
        normal(vocab, teacher_width, scale=teacher_width**-0.5),
        torch.randint(vocab, (tokens,), generator=generator).to(DEVICE),
    )


def chunked(inputs: Inputs, chunk_tokens: int) -> Tensor:
    return DistillationLoss(forward_kl, TEMPERATURE, SOFT_WEIGHT, chunk_tokens)(*inputs)[0]


def plain(inputs: Inputs) -> Tensor:
    """The textbook: both models' whole logits, PyTorch's own losses, autograd."""
    student_NV = F.linear(inputs.student_x_ND, inputs.student_head_VD)
    teacher_NV = F.linear(inputs.teacher_x_ND, inputs.teacher_head_VD)
    soft = F.kl_div(
        (student_NV / TEMPERATURE).log_softmax(-1),
        (teacher_NV / TEMPERATURE).log_softmax(-1),
        reduction="batchmean",
        log_target=True,
    )
    hard = F.cross_entropy(student_NV, inputs.targets_N)
    return SOFT_WEIGHT * TEMPERATURE**2 * soft + (1 - SOFT_WEIGHT) * hard


def backward(loss_of: Callable[[], Tensor], inputs: Inputs) -> None:
    inputs.student_x_ND.grad = inputs.student_head_VD.grad = None
    loss_of().backward()


def peak_bytes(loss_of: Callable[[], Tensor], inputs: Inputs) -> int:
    """Most bytes of tensors alive at once in forward and backward, gradients included, inputs apart."""
    live = LiveBytes(nn.ParameterList(nn.Parameter(part, part.is_floating_point()) for part in inputs))
    with live, live.record():
        backward(loss_of, inputs)
    return live.peak


def rows(
    sizes: dict[int, int] = SIZES, student_width: int = 128, teacher_width: int = 256, seconds: float = 4.0
) -> Iterator[Row | str]:
    for vocab, tokens in sizes.items():
        what = f"chunked, {tokens} tokens, vocabulary {vocab}"
        if why := too_large(f"the plain loss, {tokens} tokens of {vocab},", 4 * PLAIN_LOGITS * tokens * vocab):
            yield why
            continue
        inputs = some_inputs(tokens, vocab, student_width, teacher_width)
        ways: dict[str, Callable[[], Tensor]] = {
            "chunked": partial(chunked, inputs, tokens // 4),
            "plain": partial(plain, inputs),
        }
        actions: dict[str, Action] = {name: partial(backward, way, inputs) for name, way in ways.items()}
        times = interleaved(actions, seconds)
        yield Row.of(
            "distillation loss",
            f"{what}: time",
            times.median("chunked") * 1e3,
            "plain",
            times.median("plain") * 1e3,
            "ms",
            times.ratio("plain", "chunked"),
            times.rounds,
        )
        ours, theirs = (peak_bytes(ways[name], inputs) for name in ("chunked", "plain"))
        ratio = Ratio(theirs / ours, theirs / ours, theirs / ours)  # counted, not timed: the same each time
        yield Row.of(
            "distillation loss", f"{what}: peak memory", ours / 1e6, "plain", theirs / 1e6, "MB", ratio, 1
        )
