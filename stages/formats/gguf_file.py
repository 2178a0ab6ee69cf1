"""A dense model as a GGUF file, which llama.cpp and what is built on it (Ollama, LM Studio) read.

llama.cpp's own converter knows tokenizers by a hash of a test sentence, and refuses every one that was trained here.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch

from stages.files.artifacts import Refusal, written_whole
from stages.files.extras import extra
from stages.formats.gguf_names import halves_from_pairs, names_of, pairs_from_halves, rotated_heads
from stages.formats.gguf_tokenizer import add_tokenizer
from stages.model import hub
from stages.model.families.qwen3.model import Qwen3Shape
from stages.model.families.registry import family_of

KINDS = {"f32": "F32", "f16": "F16", "q8_0": "Q8_0"}  # our word, and the package's for the matrices
FILE_TYPES = {"f32": "ALL_F32", "f16": "MOSTLY_F16", "q8_0": "MOSTLY_Q8_0"}
Q8_0_BLOCK = 32  # numbers that share a scale: a row must be a multiple of it


def write_gguf(folder: Path, path: Path, kind: str) -> None:
    """Writes the model of a complete folder; `kind` is one of `KINDS`. Equal folders give equal bytes.

    Norms and biases stay float32, and a matrix whose rows q8_0 cannot cut into blocks is f16, as llama.cpp's own tools
    leave them. A mixture, a tokenizer whose word pattern has no name in llama.cpp, and q8_0 of a model as narrow as no
    block, are refused.
    """
    (gguf,) = extra("gguf", "gguf")
    model = hub.load(folder)
    architecture = _architecture(model, folder)
    writer = gguf.GGUFWriter(path=None, arch=architecture)
    _describe(gguf, writer, model.shape, folder.name, kind)
    add_tokenizer(writer, folder, model.shape.vocab_size)
    if kind == "q8_0" and model.shape.width % Q8_0_BLOCK:
        raise Refusal(f"{folder} is {model.shape.width} wide, q8_0 needs a multiple of {Q8_0_BLOCK}: f16")
    for theirs, values in _tensors(model, architecture).items():
        wanted = KINDS[kind] if values.ndim > 1 else "F32"
        if wanted == "Q8_0" and values.shape[1] % Q8_0_BLOCK:
            wanted = "F16"
        quantised = getattr(gguf.GGMLQuantizationType, wanted)
        writer.add_tensor(theirs, gguf.quants.quantize(values, quantised), raw_dtype=quantised)
    with written_whole(path) as partial:
        writer.write_header_to_file(partial)
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()


def _architecture(model: Any, folder: Path) -> str:
    """llama.cpp's; Mistral is its llama."""
    if not family_of(model.shape).dense_target:  # nor could llama.cpp load our teacher: it demands a q_lora_rank
        what = f"{folder}: no GGUF of the family {family_of(model.shape).name}"
        own = "only models of our own dense class are written (Llama, Mistral, Qwen2, Qwen3)"
        raise Refusal(f"{what}: {own}; export the student")
    if model.shape.attention_bias:
        raise Refusal(f"{folder}: no GGUF of a {model.shape.kind} with attention_bias: llama.cpp has no place for it")
    if model.shape.kind == "qwen2" and (queries := model.shape.heads * model.shape.head_dim) != model.shape.width:
        text = f"{folder}: no GGUF of a qwen2 whose heads ({queries} wide in all) are not as wide as the model"
        raise Refusal(f"{text} ({model.shape.width}): llama.cpp's loader refuses it")
    return "llama" if model.shape.kind == "mistral" else model.shape.kind


def _tensors(model: Any, architecture: str) -> dict[str, np.ndarray]:
    """By GGUF's names, float32, in its order of rows."""
    shape, theirs = model.shape, {ours: name for name, ours in names_of(architecture, model.shape.layers).items()}
    tensors = {}
    for name, tensor in family_of(shape).to_hub(model).items():
        heads = rotated_heads(architecture, name, shape.heads, shape.kv_heads)
        tensors[theirs[name]] = pairs_from_halves(tensor.detach().contiguous().numpy(), heads)
    return tensors


def _describe(gguf: Any, writer: Any, shape: Qwen3Shape, name: str, kind: str) -> None:
    writer.add_type(gguf.GGUFType.MODEL)
    writer.add_name(name)
    writer.add_file_type(gguf.LlamaFileType[FILE_TYPES[kind]])
    writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
    writer.add_block_count(shape.layers)
    writer.add_context_length(shape.sequence_tokens)
    writer.add_embedding_length(shape.width)
    writer.add_feed_forward_length(shape.mlp_width)
    writer.add_head_count(shape.heads)
    writer.add_head_count_kv(shape.kv_heads)
    writer.add_key_length(shape.head_dim)
    writer.add_value_length(shape.head_dim)
    writer.add_rope_freq_base(shape.rope_theta)
    writer.add_layer_norm_rms_eps(shape.norm_epsilon)


def load_gguf(folder: Path, path: Path) -> Any:
    """The model of a folder with the weights of its GGUF file, quantised or not: what a runtime computes with."""
    (gguf,) = extra("gguf", "gguf")
    model = hub.load(folder)
    architecture, shape = _architecture(model, folder), model.shape
    names, found = names_of(architecture, shape.layers), {}
    for tensor in gguf.GGUFReader(path).tensors:
        values = gguf.quants.dequantize(tensor.data, tensor.tensor_type)
        heads = rotated_heads(architecture, names[tensor.name], shape.heads, shape.kv_heads)
        found[names[tensor.name]] = torch.from_numpy(halves_from_pairs(values, heads).copy())
    model.load_state_dict(family_of(shape).from_hub(found, model))
    return model
