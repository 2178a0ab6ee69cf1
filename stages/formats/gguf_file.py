"""A dense student as a GGUF file, which llama.cpp and what is built on it (Ollama, LM Studio) read.

llama.cpp's own converter knows tokenizers by a hash of a test sentence, and refuses every one that was trained here.
The names of tensors come from the package `gguf`; the values need no change, as our layout is Qwen3's.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from stages.data.hub_tokenizer import load_hub_tokenizer
from stages.data.shards import END_OF_TEXT, TOKENIZER
from stages.files.artifacts import Refusal, read_json, written_whole
from stages.files.extras import extra
from stages.model import hub
from stages.model.families.qwen3.model import Qwen3Shape
from stages.model.families.registry import family_of
from stages.model.kernels.norm import NORM_EPSILON

KINDS = {"f32": "F32", "f16": "F16", "q8_0": "Q8_0"}  # our word, and the package's for the matrices
FILE_TYPES = {"f32": "ALL_F32", "f16": "MOSTLY_F16", "q8_0": "MOSTLY_Q8_0"}
Q8_0_BLOCK = 32  # numbers that share a scale: a row must be a multiple of it
# llama.cpp loads no tokenizer without merges, which plain bytes have not. What this one makes is no token, and a piece
# that is no token falls back to its bytes.
NO_MERGE = "Z Z"
PRE_TOKENIZER = "gpt-2"  # llama.cpp's name of the pattern that `prepare` splits words by


def write_gguf(folder: Path, path: Path, kind: str) -> None:
    """Writes the model of a complete folder; `kind` is one of `KINDS`. Equal folders give equal bytes.

    Norms stay float32, as everywhere in llama.cpp. A model that is no Qwen3, a tokenizer that splits words by another
    pattern, and a matrix whose rows q8_0 cannot cut into blocks, are refused.
    """
    (gguf,) = extra("gguf", "gguf")
    model = hub.load(folder)
    family = family_of(model.shape)
    if family.name != "qwen3":
        raise Refusal(
            f"{folder}: no GGUF of the family {family.name}: llama.cpp's loader of deepseek2 demands a q_lora_rank,"
            " which this teacher has not; export the student"
        )
    writer = gguf.GGUFWriter(path=None, arch="qwen3")
    _describe(gguf, writer, model.shape, folder.name, kind)
    _add_tokenizer(gguf, writer, folder, model.shape.vocab_size)
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.QWEN3, model.shape.layers)
    for name, tensor in family.to_hub(model).items():
        values = tensor.detach().contiguous().numpy()
        wanted = KINDS[kind] if values.ndim > 1 else "F32"
        if wanted == "Q8_0" and values.shape[1] % Q8_0_BLOCK:
            raise Refusal(f"{folder}: {name} has rows of {values.shape[1]}, q8_0 needs a multiple of {Q8_0_BLOCK}: f16")
        quantised = getattr(gguf.GGMLQuantizationType, wanted)
        theirs = names.get_name(name, try_suffixes=(".weight",))
        writer.add_tensor(theirs, gguf.quants.quantize(values, quantised), raw_dtype=quantised)
    with written_whole(path) as partial:
        writer.write_header_to_file(partial)
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()


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
    writer.add_layer_norm_rms_eps(NORM_EPSILON)


def _add_tokenizer(gguf: Any, writer: Any, folder: Path, vocab_size: int) -> None:
    """Byte-level BPE, as tokenizer.json has it; the end of a text is a control token, which no text can spell."""
    end, path = load_hub_tokenizer(folder, vocab_size).end_of_text, folder / TOKENIZER
    content = read_json(path)
    merges = [" ".join(pair) for pair in content["model"]["merges"]]
    if not _splits_words_as_gpt2(content, merges):
        raise Refusal(f"{path}: no GGUF of a tokenizer with another word pattern than GPT-2's, which is not known here")
    ids = content["model"]["vocab"] | {added["content"]: added["id"] for added in content["added_tokens"]}
    kinds = dict.fromkeys(ids, gguf.TokenType.NORMAL) | {END_OF_TEXT: gguf.TokenType.CONTROL}
    for beyond in range(len(ids), vocab_size):  # rows of a padded embedding
        ids[f"[PAD{beyond}]"], kinds[f"[PAD{beyond}]"] = beyond, gguf.TokenType.UNUSED
    tokens = sorted(ids, key=ids.__getitem__)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(PRE_TOKENIZER)
    writer.add_token_list(tokens)
    writer.add_token_types([kinds[token] for token in tokens])
    writer.add_token_merges(merges or [NO_MERGE])
    writer.add_eos_token_id(end)
    writer.add_pad_token_id(end)
    writer.add_add_bos_token(False)
    writer.add_add_space_prefix(False)


def _splits_words_as_gpt2(content: dict, merges: list[str]) -> bool:
    """As `prepare` trains it. Without merges it does not matter where words are split."""
    pattern = content["pre_tokenizer"] or {}
    alone = pattern.get("type") == "ByteLevel" and not pattern["add_prefix_space"] and not content["normalizer"]
    return alone and (pattern["use_regex"] or not merges)


def load_gguf(folder: Path, path: Path) -> Any:
    """The model of a folder with the weights of its GGUF file, quantised or not: what a runtime computes with."""
    (gguf,) = extra("gguf", "gguf")
    model = hub.load(folder)
    family, names = family_of(model.shape), gguf.get_tensor_name_map(gguf.MODEL_ARCH.QWEN3, model.shape.layers)
    found = {}
    for tensor in gguf.GGUFReader(path).tensors:
        found[tensor.name] = torch.from_numpy(gguf.quants.dequantize(tensor.data, tensor.tensor_type).copy())
    theirs = {name: found[names.get_name(name, try_suffixes=(".weight",))] for name in family.to_hub(model)}
    model.load_state_dict(family.from_hub(theirs, model))
    return model
