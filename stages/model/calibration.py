"""What a model computes on calibration batches, seen through hooks. Shapes: B sequences, T tokens."""

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor
from torch.utils.hooks import RemovableHandle


@torch.no_grad()
def read_batches(model: Any, batches: Iterable[Tensor], hooks: list[RemovableHandle]) -> None:
    """Runs the model over the batches [B, T+1] in evaluation mode; then the hooks are gone, whatever happened."""
    was_training = model.training
    model.eval()
    try:
        for tokens_BT1 in batches:
            model.features(tokens_BT1[:, :-1].to(model.head.weight.device))
    finally:
        for hook in hooks:
            hook.remove()
        model.train(was_training)
