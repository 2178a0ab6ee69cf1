"""A dense model whose matrices are eight bits a number (torchao, weight only), as a folder that transformers reads.

Each row of a matrix has a scale; products are computed in float32. Embedding and head stay as they are.
"""

from __future__ import annotations

import contextlib
import io
import logging
import time
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from stages.data.hub_tokenizer import GENERATION_CONFIG, TOKENIZER_CONFIG
from stages.data.shards import TOKENIZER
from stages.files.artifacts import Refusal, link_or_copy, read_json
from stages.formats.extras import extra
from stages.model.families.registry import family_of
from stages.model.hub import shape_from

OF_THE_WHOLE = ("weights_sha256", "config_sha256")  # of config.json: of weights that these are not


def write_int8(folder: Path, out: Path) -> None:
    """Writes the folder `out`; a mixture is refused, as torchao leaves its experts as they are."""
    torchao, transformers = _extra()
    config = read_json(folder / "config.json")
    shape = shape_from(config, folder / "config.json")
    if family_of(shape).routing(shape) is not None:
        kind = config["model_type"]
        raise Refusal(f"{folder}: no int8 of model_type {kind!r}: torchao does not see the matrices of its experts")
    with _silent():
        quantised = transformers.TorchAoConfig(torchao.quantization.Int8WeightOnlyConfig())
        model = transformers.AutoModelForCausalLM.from_pretrained(
            folder, quantization_config=quantised, dtype=torch.float32
        )
        for name in OF_THE_WHOLE:
            if hasattr(model.config, name):
                delattr(model.config, name)
        model.save_pretrained(out)
    for file in out.glob("*.safetensors"):
        file.chmod(0o644)  # it is written for its owner alone
    for name in (TOKENIZER, TOKENIZER_CONFIG, GENERATION_CONFIG):
        (out / name).unlink(missing_ok=True)
        link_or_copy(folder / name, out / name)


class Int8Model:
    """The folder in transformers on CPU."""

    def __init__(self, folder: Path):
        _, transformers = _extra()
        with _silent():
            self.model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()

    @torch.no_grad()
    def logits(self, tokens_BT: Tensor) -> Tensor:
        """[B, T, V]."""
        return self.model(tokens_BT, use_cache=False).logits

    @torch.no_grad()
    def greedy(self, ids: list[int], new_tokens: int) -> tuple[list[int], float]:
        """The likeliest continuation, and the seconds that it took after the second token."""
        tokens_BT, past, found, times = torch.tensor([ids]), None, [], []
        for _ in range(new_tokens):
            out = self.model(tokens_BT, past_key_values=past, use_cache=True)
            tokens_BT, past = out.logits[:, -1:].argmax(-1), out.past_key_values
            found.append(int(tokens_BT))
            times.append(time.perf_counter())
        return found, times[-1] - times[1]


def _extra() -> list[Any]:
    with _silent():  # torchao tells of every library for GPUs that it does not find
        torchao, _, transformers = extra("int8", "torchao", "torchao.quantization", "transformers")
    return [torchao, transformers]


@contextlib.contextmanager
def _silent() -> Iterator[None]:
    """The packages report on themselves, and show bars."""
    before = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings(), contextlib.redirect_stderr(io.StringIO()):
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(before)
