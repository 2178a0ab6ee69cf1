"""Warm start of a dense student from a teacher of another family.

    copied = initialise_student(student, teacher, calibration_batches)

A narrower student keeps the strongest directions of the teacher's residual stream, the same everywhere (as
SliceGPT does, Ashkboos et al. 2024); at equal width it keeps the channels as they are. Embedding and head
follow. Each MLP is filled with the neurons that add most to the stream, out of the teacher's dense MLP or of
its shared and routed experts. Attention becomes grouped heads, the most important ones, where the sizes allow.
What a block of the teacher holds is read through the `dense_source` of its family.

Shape legend: N tokens, D teacher width, S student width, H student heads, G its groups, m heads of a group,
d student head, P and R unrotated and rotated dimensions of a teacher's head, U its value head, F neurons, O outputs.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from stages.compress.pruning import most_important
from stages.compress.scores import importance
from stages.files.artifacts import Refusal
from stages.model.calibration import read_batches
from stages.model.families.family import DenseNeurons, DenseSource, PlainHeads
from stages.model.families.registry import family_of
from stages.model.layers import RMSNorm


@torch.no_grad()
def initialise_student(student: Any, teacher: Any, calibration_batches: Iterable[Tensor]) -> dict:
    """Fills the student in place from token batches [B, T+1] and says what came from the teacher.

    What does not fit stays as it was. Everything is a function of the weights and the batches.
    """
    source = _source_for(student, teacher)
    batches = list(calibration_batches)
    seen = _norm_inputs(teacher, batches)
    stream_DS = _strongest_directions(seen, student.shape.width)
    student.embedding.weight.copy_(source.embedding(teacher) @ stream_DS)
    read_DS = _set_norm(student.norm, teacher.norm, seen["norm"], stream_DS)
    student.head.weight.copy_(source.head(teacher) @ read_DS)

    heads = importance(teacher, batches, {"heads": "taylor"})
    copied = {"width": student.shape.width, "blocks": 0, "queries_and_keys": 0, "values_and_outputs": 0}
    neurons = {"mlp": 0, "shared": 0, "experts": 0}
    layers = layer_sources(student.shape.layers, teacher.shape.layers)
    for new, layer in zip(student.blocks, layers, strict=False):
        old, name = teacher.blocks[layer], f"blocks.{layer}"
        x_ND = seen[f"{name}.attention_norm"]
        _set_norm(new.attention_norm, old.attention_norm, x_ND, stream_DS)
        new_in_NS, old_in_ND = new.attention_norm(x_ND @ stream_DS), old.attention_norm(x_ND)
        same_rope = student.shape.rope_theta == teacher.shape.rope_theta
        plain, score_U = source.plain_heads(old, old_in_ND), heads[f"{name}.attention.heads"]
        for part in _set_attention(new.attention, plain, score_U, same_rope, new_in_NS, stream_DS):
            copied[part] += 1
        x_ND = seen[f"{name}.mlp_norm"]
        read_DS = _set_norm(new.mlp_norm, old.mlp_norm, x_ND, stream_DS)
        for part, count in _set_mlp(new.mlp, source.dense_neurons(old, old.mlp_norm(x_ND)), read_DS, stream_DS).items():
            neurons[part] += count
        copied["blocks"] += 1
    return {**copied, "neurons": neurons}


def _source_for(student: Any, teacher: Any) -> DenseSource:
    """How to read the teacher; a pair that does not fit is refused."""
    ours, theirs = student.shape, teacher.shape
    source = family_of(theirs).dense_source
    if source is None or not family_of(ours).dense_target:
        words = "pruned (a student cut out of it) or random" if family_of(theirs).dense_target else "random"
        raise Refusal(
            f"distill.init = teacher: a {family_of(ours).name} student cannot start from a"
            f" {getattr(theirs, 'kind', family_of(theirs).name)} teacher: set distill.init to {words}"
        )
    if reason := source.unfit(teacher):
        raise Refusal(
            f"distill.init = teacher: no student starts from this teacher, as {reason}: set distill.init to random"
        )
    if ours.vocab_size != theirs.vocab_size:
        raise Refusal(
            f"distill.init = teacher: the student has a vocabulary of {ours.vocab_size}, the teacher of"
            f" {theirs.vocab_size}: prepare once for both, or set distill.init to random"
        )
    if ours.width > theirs.width:
        raise Refusal(
            f"distill.init = teacher: student.width ({ours.width}) exceeds the width of artifacts/teacher"
            f" ({theirs.width}): train the teacher with these settings (dvc repro), make the student smaller,"
            " or set distill.init to random"
        )
    return source


def layer_sources(student_layers: int, teacher_layers: int) -> list[int]:
    """The teacher's layer for each of the student's, evenly from first to last; surplus ones get none."""
    if student_layers >= teacher_layers:
        return list(range(teacher_layers))
    return [round(i * (teacher_layers - 1) / max(student_layers - 1, 1)) for i in range(student_layers)]


# ---- the residual stream ---------------------------------------------------------------------------------


def _norm_inputs(teacher: Any, batches: list[Tensor]) -> dict[str, Tensor]:
    """The residual stream as each norm of width D meets it, [N, D]."""
    seen: dict[str, list[Tensor]] = {}
    hooks = []
    blocks = [f"blocks.{layer}" for layer in range(len(teacher.blocks))]
    for name in [*(f"{at}.{norm}" for at in blocks for norm in ("attention_norm", "mlp_norm")), "norm"]:
        keep = seen.setdefault(name, []).append
        module = teacher.get_submodule(name)
        hooks.append(module.register_forward_pre_hook(lambda _, x, keep=keep: keep(x[0].flatten(0, 1))))
    read_batches(teacher, batches, hooks)
    if not seen["norm"]:
        raise Refusal("distill.init = teacher: no calibration batch was given")
    return {name: torch.cat(parts).float() for name, parts in seen.items()}


def _strongest_directions(seen: dict[str, Tensor], width: int) -> Tensor:
    """Orthonormal columns [D, S]: principal directions of the normalised stream, all norms alike."""
    first = next(iter(seen.values()))
    if width == first.shape[1]:
        return torch.eye(width, device=first.device)
    moment_DD = sum(_moment(F.rms_norm(x_ND, x_ND.shape[1:])) / len(x_ND) for x_ND in seen.values())
    return torch.linalg.eigh(moment_DD).eigenvectors.flip(1)[:, :width].to(first)


def _moment(x_NO: Tensor) -> Tensor:
    return x_NO.double().T @ x_NO.double()


def _set_norm(new: RMSNorm, old: RMSNorm, x_ND: Tensor, stream_DS: Tensor) -> Tensor:
    """Sets the student's norm; returns [D, S], which rebuilds what the teacher reads from what it gives.

    The teacher's norm weights act on channels that the student no longer has: they move into the matrices
    that read. The student's norm divides by the rms of fewer dimensions; one number makes up for the ratio.
    """
    x_NS = x_ND @ stream_DS
    new.weight.fill_(x_NS.square().mean().sqrt() / x_ND.square().mean().sqrt())
    prior_DS = old.weight[:, None] * stream_DS
    return least_squares(new(x_NS), old(x_ND), prior_DS)


def least_squares(x_NS: Tensor, y_NO: Tensor, prior_OS: Tensor | None = None) -> Tensor:
    """The weight [O, S] that makes y of x, drawn to the prior (or to zero) where x says little."""
    x_NS, rest_NO = x_NS.double(), y_NO.double()
    if prior_OS is not None:
        rest_NO = rest_NO - x_NS @ prior_OS.double().T
    gram_SS = _moment(x_NS)
    gram_SS.diagonal().add_(1e-4 * gram_SS.diagonal().mean())
    weight_OS = torch.linalg.solve(gram_SS, x_NS.T @ rest_NO).T
    return (weight_OS if prior_OS is None else weight_OS + prior_OS).float()


# ---- experts to one MLP ----------------------------------------------------------------------------------


def _set_mlp(new: Any, old: DenseNeurons, read_DS: Tensor, stream_DS: Tensor) -> dict[str, int]:
    kept_F = most_important(old.score_F, new.down.in_features)
    count, origins = len(kept_F), [old.origins[j] for j in kept_F.tolist()]
    kept_F = kept_F.to(old.gate_FD.device)
    gate_FS, up_FS = new.gate_up.weight.chunk(2, dim=0)
    gate_FS[:count] = old.gate_FD[kept_F] @ read_DS
    up_FS[:count] = old.up_FD[kept_F] @ read_DS
    new.down.weight[:, :count] = stream_DS.T @ old.down_DF[:, kept_F]
    new.down.weight[:, count:] = 0  # neurons beyond the teacher's: silent, but ready to learn
    return {origin: origins.count(origin) for origin in set(origins)}


# ---- plain heads to grouped heads ------------------------------------------------------------------------


def _set_attention(
    new: Any, old: PlainHeads, score_U: Tensor, same_rope: bool, x_NS: Tensor, stream_DS: Tensor
) -> list[str]:
    """Translates values with outputs, and queries with keys, where sizes allow; returns which of them."""
    if (heads_H := _heads_for(new, old, score_U)) is None:
        return []
    heads_H, per_group = heads_H.to(x_NS.device), new.heads // new.kv_heads
    query_HNd, key_HNd, value_HNU, output_HDU = (part[heads_H] for part in old[:4])
    copied = []
    if new.head_dim <= per_group * value_HNU.shape[2]:
        value_GNd, back_HUd = shared_parts(value_HNU, output_HDU, new.kv_heads, new.head_dim)
        new.value.weight.copy_(least_squares(x_NS, value_GNd.transpose(0, 1).flatten(1)))
        new.output.weight.copy_(stream_DS.T @ (output_HDU @ back_HUd).transpose(0, 1).flatten(1))
        copied.append("values_and_outputs")
    free = new.head_dim - old.rotated  # dimensions left for what the teacher does not rotate
    plain = query_HNd.shape[2] - old.rotated
    if same_rope and new.head_dim % old.rotated == 0 and 0 <= free <= per_group * plain:
        norms = (old.query_norm_d, old.key_norm_d) if free == plain == 0 else (None, None)
        _set_queries_and_keys(new, old.rotated, query_HNd, key_HNd, norms, x_NS)
        copied.append("queries_and_keys")
    return copied


def _heads_for(new: Any, old: PlainHeads, score_U: Tensor) -> Tensor | None:
    """The teacher's heads [H] for the student's, group by group; None where it has too few.

    Where heads of a group have a key of their own, a group of the student takes its heads from one of the teacher's.
    """
    if old.key_groups is None:
        return most_important(score_U, new.heads) if new.heads <= len(score_U) else None
    per_group, theirs = new.heads // new.kv_heads, len(old.query_HNd) // old.key_groups
    if new.kv_heads > old.key_groups or per_group > theirs:
        return None
    groups_G = most_important(score_U, new.kv_heads)
    return (groups_G[:, None] * theirs + torch.arange(per_group)).flatten()


def shared_parts(part_HNP: Tensor, reader_HOP: Tensor, groups: int, size: int) -> tuple[Tensor, Tensor]:
    """One part for all heads of a group, [G, N, size], and each head's way back to its own, [H, P, size].

    The parts of a group's heads, side by side, are cut to their principal directions, strongest first, where
    a direction counts by what its head's reader (output matrix, or queries) makes of it.
    """
    moment_HPP = reader_HOP.double().mT @ reader_HOP.double()
    value_HP, vector_HPP = torch.linalg.eigh(moment_HPP)
    root_HP = value_HP.clamp(min=1e-6 * value_HP.amax(dim=1, keepdim=True)).clamp(min=1e-30).sqrt()
    weighted_HNP = part_HNP.double() @ vector_HPP * root_HP[:, None]
    side_by_side_GNM = weighted_HNP.unflatten(0, (groups, -1)).transpose(1, 2).flatten(2)
    moment_GMM = side_by_side_GNM.mT @ side_by_side_GNM
    basis_GMd = torch.linalg.eigh(moment_GMM).eigenvectors.flip(2)[:, :, :size]
    basis_HPd = basis_GMd.unflatten(1, (-1, part_HNP.shape[2])).flatten(0, 1)
    back_HPd = vector_HPP / root_HP[:, None] @ basis_HPd
    return (side_by_side_GNM @ basis_GMd).float(), back_HPd.float()


def _set_queries_and_keys(
    new: Any, rotated: int, query_HNd: Tensor, key_HNd: Tensor, norms: tuple[Tensor | None, Tensor | None], x_NS: Tensor
) -> None:
    """The heads of a group share the teacher's rotated key: only the unrotated part must be cut down to the group's.

    `norms` are those that come after queries and keys in the teacher; where it has none, they undo what they do.
    """
    old_head_dim, per_group = query_HNd.shape[2], new.heads // new.kv_heads
    query_HNP, query_HNR = query_HNd.split([old_head_dim - rotated, rotated], dim=2)
    key_HNP, key_HNR = key_HNd.split([old_head_dim - rotated, rotated], dim=2)
    free = new.head_dim - rotated
    scale: Any = 1.0
    if free:
        key_GNf, back_HPf = shared_parts(key_HNP, query_HNP, new.kv_heads, free)
        query_HNf = query_HNP @ back_HPf
        # the norms below see both parts together: give the cut one its old share of the query
        scale = query_HNP.norm() / query_HNf.norm().clamp(min=1e-30)
    else:
        key_GNf, query_HNf = key_HNP[: new.kv_heads, :, :0], query_HNP[..., :0]
    query_HNd = torch.cat([query_HNf * scale, query_HNR], dim=2)
    key_GNd = torch.cat([key_GNf / scale, key_HNR[::per_group]], dim=2)
    order_d = rope_order(free, rotated)
    parts = (new.query, new.query_norm, query_HNd, norms[0]), (new.key, new.key_norm, key_GNd, norms[1])
    for linear, norm, part_HNd, old_norm_d in parts:
        linear.weight.copy_(least_squares(x_NS, part_HNd[:, :, order_d].transpose(0, 1).flatten(1)))
        if old_norm_d is None:
            norm.weight.fill_(linear(x_NS).square().mean().sqrt())  # gives back the size that it divides away
        else:
            norm.weight.copy_(old_norm_d)
    new.query_norm.weight.mul_((new.head_dim / old_head_dim) ** 0.5)  # softmax scales differ


def rope_order(free: int, rotated: int) -> list[int]:
    """Which dimension of [unrotated, strongest first; rotated] stands at each place of a student's head.

    The student rotates all d dimensions, its pair j by theta^(-2j/d) per token; the teacher's pair i turns by
    theta^(-2i/R). So pair i finds its very frequency at j = i d/R. The unrotated dimensions take the pairs in
    between, the strongest the slowest ones, which hardly turn.
    """
    half, step = (free + rotated) // 2, (free + rotated) // rotated
    order = [-1] * (free + rotated)
    for i in range(rotated // 2):
        order[i * step], order[i * step + half] = free + i, free + i + rotated // 2
    between = [j for j in reversed(range(half)) if order[j] < 0]
    for i, j in enumerate(between):
        order[j], order[j + half] = 2 * i, 2 * i + 1
    return order
