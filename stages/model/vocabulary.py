"""Rows of embedding and head: a model with some of its vocabulary, and back (`teacher.trim_vocabulary`).

    smaller = with_rows(model, kept)                    # token n is what kept[n] was
    whole = restored(smaller, model, kept)              # the other rows are the model's again
    nats = dropped_nats(model, batches, kept)           # by which the loss falls when the others leave the softmax

Shapes: B sequences, T tokens, D width, V vocabulary, K kept tokens.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from stages.files.artifacts import Refusal
from stages.model.families.registry import family_of
from stages.model.hub import empty_model

LEAST_COSINE = 0.5  # of rows that were trained on from the teacher's; of unrelated ones it is about 0


@torch.no_grad()
def with_rows(model: Any, kept: list[int]) -> Any:
    """A model of the kept tokens alone, in their order; nothing is shared with the one it was taken from."""
    rows_K = torch.tensor(kept)
    return _rebuilt(model, {"embedding": model.embedding.weight[rows_K], "head": model.head.weight[rows_K]})


@torch.no_grad()
def restored(model: Any, teacher: Any, kept: list[int], name: str = "the model") -> Any:
    """The model with the teacher's vocabulary: its own rows for the kept tokens, for all others the teacher's.

    A model that does not read and write the teacher's residual stream is refused: the rows mean nothing in it. `name`
    is for the message.
    """
    ours, theirs = family_of(model.shape).name, family_of(teacher.shape).name
    if ours != theirs:
        raise Refusal(f"no whole vocabulary: {name} is of the family {ours}, the teacher of {theirs}")
    if model.shape.width != teacher.shape.width:
        raise Refusal(
            f"no whole vocabulary: the width of {name} is {model.shape.width}, the teacher's {teacher.shape.width}"
        )
    rows_K, rows = torch.tensor(kept), {}
    for part in ("embedding", "head"):
        own_KD, whole_VD = getattr(model, part).weight, getattr(teacher, part).weight.clone()
        cosine = F.cosine_similarity(own_KD, whole_VD[rows_K]).mean().item()
        if cosine < LEAST_COSINE:
            raise Refusal(
                f"no whole vocabulary: the {part} of {name} did not start from the teacher's (mean cosine of their"
                f" rows {cosine:.2f}, below {LEAST_COSINE}), so that the teacher's other rows mean nothing in it"
            )
        whole_VD[rows_K] = own_KD
        rows[part] = whole_VD
    return _rebuilt(model, rows)


def _rebuilt(model: Any, rows: dict[str, Tensor]) -> Any:
    other = empty_model(replace(model.shape, vocab_size=len(rows["embedding"])))
    replaced = {id(getattr(model, name).weight): part for name, part in rows.items()}  # one and the same where tied
    state = {
        name: replaced[id(part)] if id(part) in replaced else part.clone()
        for name, part in model.state_dict(keep_vars=True).items()
    }
    other.load_state_dict(state, strict=True, assign=True)
    return other.requires_grad_().train(model.training)


@torch.no_grad()
def dropped_nats(model: Any, batches: Iterable[Tensor], kept: list[int]) -> float:
    """Mean of -log of the probability that the kept tokens have together, per token of the batches [B, T]."""
    rows_K, total, count = torch.tensor(kept), 0.0, 0
    for tokens_BT in batches:
        for tokens_1T in tokens_BT.split(1):  # whose logits [1, T, V] stand in memory together
            logits_TV = model(tokens_1T)[0].float()
            lost_T = logits_TV.logsumexp(-1) - logits_TV[:, rows_K].logsumexp(-1)
            total, count = total + lost_T.double().sum().item(), count + len(lost_T)
    return total / count
