"""Tensors shared out over the ranks (torch's DTensor, as FSDP2 makes them), and a state of them whole or in parts.

A state is any nesting of dicts and lists of tensors and plain values, as `state_dict()` gives it. `whole` and `shard`
are collectives: every rank calls them at the same point.
"""

from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import fully_shard, register_fsdp_forward_method
from torch.distributed.tensor import DTensor, distribute_tensor

PART = "__part__"  # marks a rank's part of a tensor in a saved state


def shard(model: nn.Module, mesh: DeviceMesh) -> None:
    """Shares the model's weights out over the mesh: of one dimension, or of two, which are replicas x shards.

    A block's weights are gathered when it computes and freed behind it. Embedding, norm and head stay gathered from
    the forward pass to the backward pass: the losses read the head's weights after `features`.
    """
    for block in model.blocks:
        fully_shard(block, mesh=mesh)
    fully_shard(model, mesh=mesh, reshard_after_forward=False)
    register_fsdp_forward_method(model, "features")


def local(tensor: Tensor) -> Tensor:
    """What this rank holds of it."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def full(tensor: Tensor) -> Tensor:
    """The whole tensor, on every rank."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def shared_out(tensor: Tensor, like: Tensor) -> Tensor:
    """This rank's part of a whole tensor that every rank has; as it is where `like` is whole."""
    if not isinstance(like, DTensor) or isinstance(tensor, DTensor):
        return tensor
    return distribute_tensor(tensor.to(like.device), like.device_mesh, like.placements, src_data_rank=None)


def whole(state: Any, keep: bool) -> Any:
    """The state with whole tensors on CPU where `keep`, one at a time; None in their place on the other ranks."""
    if isinstance(state, DTensor):
        gathered = state.full_tensor()
        return gathered.cpu() if keep else None
    if isinstance(state, dict):
        return {key: whole(value, keep) for key, value in state.items()}
    if isinstance(state, (list, tuple)):
        return [whole(value, keep) for value in state]
    return state


def part(state: Any) -> Any:
    """The state with this rank's parts of its tensors and where they lie; of replicas only the first has them."""
    if isinstance(state, DTensor):
        (chunk,) = state.__create_chunk_list__()
        at = zip(state.placements, state.device_mesh.get_coordinate() or (), strict=True)
        is_first = all(place == 0 for placement, place in at if placement.is_replicate())
        kept = state.to_local() if is_first else None
        return {PART: kept, "start": list(chunk.offsets), "shape": list(state.shape)}
    if isinstance(state, dict):
        return {key: part(value) for key, value in state.items()}
    if isinstance(state, (list, tuple)):
        return [part(value) for value in state]
    return state


def joined(parts: list[Any]) -> Any:
    """The whole state from the parts of all ranks; what is no tensor's part comes from the first."""
    first = parts[0]
    if isinstance(first, dict) and PART in first:
        return _joined_tensor(parts)
    if isinstance(first, dict):
        return {key: joined([one[key] for one in parts]) for key in first}
    if isinstance(first, list):
        return [joined(list(same)) for same in zip(*parts, strict=True)]
    return first


def _joined_tensor(parts: list[dict]) -> Tensor:
    shape = parts[0]["shape"]
    held = [(one[PART], one["start"]) for one in parts if one[PART] is not None]
    numbers = sum(piece.numel() for piece, _ in held)
    tensor = held[0][0].new_empty(shape)
    if numbers != tensor.numel():
        raise ValueError(f"a tensor of {tensor.numel()} numbers has parts of {numbers}")
    for piece, start in held:
        if piece.numel():
            tensor[tuple(slice(at, at + size) for at, size in zip(start, piece.shape, strict=True))] = piece
    return tensor


def restore_optimizer(optimizer: torch.optim.Optimizer, state: dict) -> None:
    """Loads a whole state, of which each rank takes its part, as its parameters are shared out."""
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    moments = {
        number: {name: _like_parameter(value, parameters[number]) for name, value in values.items()}
        for number, values in state["state"].items()
    }
    optimizer.load_state_dict(state | {"state": moments})


def _like_parameter(value: Any, parameter: Tensor) -> Any:
    """Moments are shared out as their parameter; a count of steps is whole."""
    return shared_out(value, parameter) if isinstance(value, Tensor) and value.shape == parameter.shape else value
