"""A model as an ONNX graph that scores texts: token ids in, logits out, any batch and any length.

It has no key-value cache. For generation ONNX Runtime GenAI builds a graph of its own from the model folder.
The graph is traced from transformers' class, which asks for nothing but what ONNX has.
"""

from __future__ import annotations

import contextlib
import io
import logging
import warnings
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from stages.files.artifacts import Refusal, read_json, written_whole
from stages.files.extras import extra

INPUT, OUTPUT = "input_ids", "logits"


class _Scores(nn.Module):
    def __init__(self, model: nn.Module):
        super().__init__()
        self.model = model

    def forward(self, input_ids: Tensor) -> Tensor:
        return self.model(input_ids=input_ids, use_cache=False).logits


def write_onnx(folder: Path, path: Path) -> None:
    """Writes the graph, float32, with its weights inside; a model that transformers does not know is refused."""
    _, _, transformers = extra("onnx", "onnx", "onnxscript", "transformers")
    if (kind := read_json(folder / "config.json")["model_type"]) not in transformers.CONFIG_MAPPING:
        raise Refusal(f"{folder}: no ONNX of model_type {kind!r}: its graph comes from transformers, which lacks it")
    with _silent():
        model = transformers.AutoModelForCausalLM.from_pretrained(
            folder, dtype=torch.float32, experts_implementation="batched_mm"  # the one that ONNX has operators for
        ).eval()
    longest = model.config.max_position_embeddings
    shapes = {INPUT: {0: torch.export.Dim("batch"), 1: torch.export.Dim("sequence", max=longest)}}
    example = torch.zeros(2, min(8, longest), dtype=torch.long)
    with torch.no_grad(), _silent():
        program = torch.onnx.export(
            _Scores(model), (example,), dynamo=True, dynamic_shapes=shapes, input_names=[INPUT], output_names=[OUTPUT]
        )
    for node in program.model.graph.all_nodes():
        node.metadata_props.clear()  # where in which file it was traced: paths of this machine
    with written_whole(path) as partial:
        program.save(str(partial), external_data=False)


@contextlib.contextmanager
def _silent():
    """transformers shows a bar; the exporter prints its progress, and warnings that are about itself."""
    logging.getLogger("torch.onnx").setLevel(logging.ERROR)
    nowhere = io.StringIO()
    with warnings.catch_warnings(), contextlib.redirect_stdout(nowhere), contextlib.redirect_stderr(nowhere):
        warnings.simplefilter("ignore")
        yield


class OnnxModel:
    """The graph in onnxruntime on CPU."""

    def __init__(self, path: Path, threads: int):
        (runtime,) = extra("onnx", "onnxruntime")
        options = runtime.SessionOptions()
        options.intra_op_num_threads = threads
        self.session: Any = runtime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])

    def logits(self, tokens_BT: Tensor) -> Tensor:
        """[B, T, V]."""
        (logits_BTV,) = self.session.run([OUTPUT], {INPUT: tokens_BT.numpy()})
        return torch.from_numpy(logits_BTV)
