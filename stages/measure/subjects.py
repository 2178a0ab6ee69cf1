"""The models of the pipeline that evaluate and profile measure, and the training step that both measure of them."""

from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from torch import nn

from stages.files.artifacts import Refusal
from stages.model import hub as models
from stages.model.losses import after_head, next_token

PRODUCTS = ("teacher", "student", "sparse_teacher", "sparse_student")
CONTROLS = {  # what else the same tokens, or the same operations, would have given
    "student": ("control", "warm_control", "cold_student", "scratch_student"),
    "sparse_teacher": ("continued_teacher", "scratch_sparse_teacher"),
    "sparse_student": ("continued_student", "scratch_sparse_student"),
}
MODELS = (*PRODUCTS, *(name for names in CONTROLS.values() for name in names))


def load_models(artifacts: Path, vocab_size: int, names: Iterable[str] = MODELS) -> dict[str, nn.Module]:
    """Each model in its folder under `artifacts`, on the GPU where there is one; all must know one vocabulary."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    loaded = {}
    for name in names:
        model = models.load(artifacts / name)
        if model.shape.vocab_size != vocab_size:
            raise Refusal(
                f"artifacts/{name} has a vocabulary of {model.shape.vocab_size} tokens, artifacts/data of"
                f" {vocab_size}: they come from different runs; run dvc repro"
            )
        loaded[name] = model.to(device)
    return loaded


def deepened(model: nn.Module, layers: int, seed: int) -> nn.Module:
    """A model of this shape with so many layers and fresh weights: what activation checkpointing saves and costs does
    not depend on the weights, and a trained model may have too few blocks for the policies to differ."""
    deep = models.new_model(replace(model.shape, layers=layers), seed)
    return deep.to(next(model.parameters()).device)


def device_name() -> str:
    return torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu"


def training_loss(model: nn.Module, tokens: np.ndarray, batch_sequences: int, sequence_tokens: int):
    """A function that gives the loss of a training step, as in pretraining, on the first of these tokens [N]."""
    needed = batch_sequences * (sequence_tokens + 1)
    tokens_BT1 = torch.from_numpy(np.resize(tokens, needed).reshape(batch_sequences, -1))
    tokens_BT1 = tokens_BT1.to(next(model.parameters()).device)

    def loss_of():
        x_BTD = model.features(tokens_BT1[:, :-1]).x_BTD
        targets_N = tokens_BT1[:, 1:].reshape(-1)
        return next_token(x_BTD.flatten(0, 1), model.head.weight, targets_N, after=after_head(model))

    return loss_of
