"""A GGUF file becomes a Hugging Face folder: weights without quantisation, and a tokenizer.json with its word pattern.

    python -m stages.formats.gguf_import model-Q4_K_M.gguf models/mine       # needs the extra gguf

Dense models of the architectures llama (Llama, Mistral, SmolLM2 ...), qwen2 and qwen3. Weights are float32, as exact as
the file has them: what quantisation has lost stays lost.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from stages.data.file_tokenizer import SPACE
from stages.data.hub_tokenizer import TOKENIZER_CONFIG
from stages.data.shards import TOKENIZER
from stages.files.artifacts import Refusal, sha256_of, write_atomically, write_json
from stages.formats.extras import extra
from stages.formats.gguf_names import HEAD, halves_from_pairs, names_of, rotated_heads
from stages.formats.pre_tokenizers import PRE_TOKENIZERS, WHOLE_WORDS_FIRST

SHARD_BYTES = 2 << 30  # of float32 in one file, so that a reader holds no more than it besides the model
ORIGIN = "ORIGIN.md"
CLASSES = {"llama": "LlamaForCausalLM", "qwen2": "Qwen2ForCausalLM", "qwen3": "Qwen3ForCausalLM"}


def folder_from_gguf(path: Path, out: Path) -> Path:
    """Writes the folder `out` and returns it; config.json comes last, so that a folder without it is unfinished.

    A file that is no GGUF, another architecture, a quantisation or a word pattern that is not known here, and tensors
    that are too many, missing or of another shape, are refused before anything is written.
    """
    (gguf,) = extra("gguf", "gguf")
    if not path.is_file():
        raise Refusal(f"{path} is missing: no such GGUF file")
    try:
        reader = gguf.GGUFReader(path)
        fields = {name: field.contents() for name, field in reader.fields.items()}
    except Exception as error:  # the package raises whatever comes first
        raise Refusal(f"{path} is no whole GGUF file: {' '.join(str(error).split())[:200]}") from None
    config, names = config_of(fields, {tensor.name for tensor in reader.tensors}, path)
    tokenizer, tokenizer_config = tokenizer_of(fields, path)
    tensors = {names[tensor.name]: tensor for tensor in reader.tensors}
    _check(gguf, tensors, config, path)
    out.mkdir(parents=True, exist_ok=True)
    (out / "config.json").unlink(missing_ok=True)
    _write_weights(gguf, tensors, config, out)
    write_atomically(out / TOKENIZER, json.dumps(tokenizer, ensure_ascii=False, indent=1) + "\n")
    write_json(out / TOKENIZER_CONFIG, tokenizer_config)
    write_atomically(out / ORIGIN, _origin(fields, tensors, path))
    write_json(out / "config.json", config)
    return out


# ---- the model


def config_of(fields: dict[str, Any], there: set[str], path: Path) -> tuple[dict[str, Any], dict[str, str]]:
    """config.json, and the Hugging Face name of every tensor that the file may have."""
    kind = fields.get("general.architecture")
    if kind not in CLASSES:
        raise Refusal(f"{path}: architecture {kind!r} is not read here, only {', '.join(CLASSES)}: take a folder of it")

    def value(key: str, otherwise: Any = None) -> Any:
        found = fields.get(f"{kind}.{key}", otherwise)
        if found is None or isinstance(found, list):
            what = "is missing" if found is None else "differs between layers, which is not read here"
            raise Refusal(f"{path}: {kind}.{key} {what}")
        return float(str(np.float32(found))) if isinstance(found, float) else found

    layers, width, heads = value("block_count"), value("embedding_length"), value("attention.head_count")
    head_dim = value("attention.key_length", width // heads)
    for key, only in (("rope.scaling.type", "none"), ("expert_count", 0), ("attention.sliding_window", 0)):
        if (found := value(key, only)) != only:
            raise Refusal(f"{path}: {kind}.{key} is {found!r}, which is not read here: take a Hugging Face folder")
    if value("attention.value_length", head_dim) != head_dim or value("rope.dimension_count", head_dim) != head_dim:
        raise Refusal(f"{path}: keys ({head_dim} a head), values and rotary parts of other widths are not read here")
    names = names_of(kind, layers)
    if unknown := sorted(there - names.keys()):
        raise Refusal(f"{path} has {unknown[0]} ({len(unknown)} such), which no {kind} of {layers} layers has here")
    if missing := sorted(names.keys() - there - {HEAD}):
        raise Refusal(f"{path} lacks {missing[0]} ({len(missing)} missing): copy the file again")
    theta, ends = value("rope.freq_base", 10000.0), "tokenizer.ggml.{}_token_id"
    config = {
        "architectures": [CLASSES[kind]],
        "model_type": kind,
        "vocab_size": len(fields.get("tokenizer.ggml.tokens", ())),
        "max_position_embeddings": value("context_length"),
        "num_hidden_layers": layers,
        "hidden_size": width,
        "num_attention_heads": heads,
        "num_key_value_heads": value("attention.head_count_kv", heads),
        "head_dim": head_dim,
        "intermediate_size": value("feed_forward_length"),
        "rms_norm_eps": value("attention.layer_norm_rms_epsilon"),
        "rope_theta": theta,
        "rope_parameters": {"rope_type": "default", "rope_theta": theta},
        "hidden_act": "silu",
        "tie_word_embeddings": HEAD not in there,
        "dtype": "float32",
        "bos_token_id": fields.get(ends.format("bos")),
        "eos_token_id": fields.get(ends.format("eos")),
    }
    if kind == "llama" and width % heads:  # which transformers' Llama refuses; its Mistral is the same arithmetic
        own: dict[str, Any] = {"architectures": ["MistralForCausalLM"], "model_type": "mistral", "sliding_window": None}
    else:
        own = {"llama": {"attention_bias": False, "mlp_bias": False}, "qwen2": {"use_sliding_window": False},
               "qwen3": {"use_sliding_window": False, "attention_bias": False}}[kind]  # fmt: skip
    return config | own, names


def _check(gguf: Any, tensors: dict[str, Any], config: dict[str, Any], path: Path) -> None:
    """Shapes, and that each quantisation can be read."""
    for name, tensor in tensors.items():
        found, wanted = tuple(int(size) for size in reversed(tensor.shape)), shape_of(name, config)
        if found != wanted:
            raise Refusal(f"{path}: {tensor.name} is {list(found)}, its settings say {list(wanted)}")
        try:
            gguf.quants.dequantize(tensor.data[:1], tensor.tensor_type)
        except NotImplementedError:
            raise Refusal(
                f"{path}: {tensor.name} is {tensor.tensor_type.name}, which the package gguf cannot turn into numbers:"
                " take a file in Q8_0, Q6_K, Q5_K, Q4_K or F16"
            ) from None


def shape_of(name: str, config: dict[str, Any]) -> tuple[int, ...]:
    """Of a tensor by its Hugging Face name."""
    width, inner, head_dim = config["hidden_size"], config["intermediate_size"], config["head_dim"]
    queries, keys = config["num_attention_heads"] * head_dim, config["num_key_value_heads"] * head_dim
    part = name.removesuffix(".weight").rpartition(".")[2]
    rows = {"q_proj": queries, "k_proj": keys, "v_proj": keys, "gate_proj": inner, "up_proj": inner}
    if name.endswith(".bias"):
        return (rows[name.split(".")[-2]],)
    shapes = {"embed_tokens": (config["vocab_size"], width), "lm_head": (config["vocab_size"], width),
              "o_proj": (width, queries), "down_proj": (width, inner), "q_norm": (head_dim,),
              "k_norm": (head_dim,)}  # fmt: skip
    return shapes.get(part) or ((rows[part], width) if part in rows else (width,))


def _values(gguf: Any, name: str, tensor: Any, config: dict[str, Any]) -> np.ndarray:
    """Float32, in transformers' order."""
    values = np.ascontiguousarray(gguf.quants.dequantize(tensor.data, tensor.tensor_type), dtype=np.float32)
    heads, kv_heads = config["num_attention_heads"], config["num_key_value_heads"]
    return halves_from_pairs(values, rotated_heads(config["model_type"], name, heads, kv_heads))


def _write_weights(gguf: Any, tensors: dict[str, Any], config: dict[str, Any], out: Path) -> None:
    import safetensors.numpy

    shards = list(_shards(tensors))
    index: dict[str, str] = {}
    for number, names in enumerate(shards, 1):
        file = f"model-{number:05d}-of-{len(shards):05d}.safetensors" if len(shards) > 1 else "model.safetensors"
        values = {name: _values(gguf, name, tensors[name], config) for name in names}
        write_atomically(out / file, safetensors.numpy.save(values, metadata={"format": "pt"}))
        index |= dict.fromkeys(names, file)
    if len(shards) > 1:
        size = 4 * sum(int(tensor.n_elements) for tensor in tensors.values())
        write_json(out / "model.safetensors.index.json", {"metadata": {"total_size": size}, "weight_map": index})


def _shards(tensors: dict[str, Any]) -> Iterator[list[str]]:
    names: list[str] = []
    held = 0
    for name, tensor in tensors.items():
        size = 4 * int(tensor.n_elements)
        if names and held + size > SHARD_BYTES:
            yield names
            names, held = [], 0
        names.append(name)
        held += size
    yield names


# ---- the tokenizer


def tokenizer_of(fields: dict[str, Any], path: Path) -> tuple[dict[str, Any], dict[str, Any]]:
    """tokenizer.json and tokenizer_config.json; a kind or a word pattern that is not known here is refused by name."""
    (gguf,) = extra("gguf", "gguf")
    tokens, kind = fields.get("tokenizer.ggml.tokens"), fields.get("tokenizer.ggml.model")
    if not tokens:
        raise Refusal(f"{path} has no tokenizer: take a file that has")
    kinds = fields.get("tokenizer.ggml.token_type") or [gguf.TokenType.NORMAL] * len(tokens)
    vocab = {token: id for id, token in enumerate(tokens) if kinds[id] != gguf.TokenType.UNUSED}
    marks = {gguf.TokenType.CONTROL: True, gguf.TokenType.UNKNOWN: True, gguf.TokenType.USER_DEFINED: False}
    plain = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False}
    added = [
        {"id": id, "content": tokens[id], "special": marks[mark]} | plain
        for id, mark in enumerate(kinds)
        if mark in marks and tokens[id]
    ]
    if kind == "gpt2":
        how = _byte_level(fields, vocab, path)
    elif kind == "llama":
        how = _with_byte_fallback(fields, vocab, tokens)
    else:
        raise Refusal(f"{path}: its tokenizer is of the kind {kind!r}, only gpt2 and llama are read here")
    whole = {"version": "1.0", "truncation": None, "padding": None, "added_tokens": added, "post_processor": None}
    ids = {part: fields.get(f"tokenizer.ggml.{part}_token_id") for part in ("bos", "eos", "padding", "unknown")}
    words = {part: None if id is None or id >= len(tokens) else tokens[id] for part, id in ids.items()}
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": words["bos"],
        "eos_token": words["eos"],
        "pad_token": words["padding"],
        "unk_token": words["unknown"],
        "clean_up_tokenization_spaces": False,
    }
    if template := fields.get("tokenizer.chat_template"):
        config["chat_template"] = template
    return whole | how, config


def _byte_level(fields: dict[str, Any], vocab: dict[str, int], path: Path) -> dict[str, Any]:
    pre = fields.get("tokenizer.ggml.pre", "default")
    if pre not in PRE_TOKENIZERS:
        raise Refusal(
            f"{path}: how its tokenizer splits words, {pre!r}, is not known here, only {', '.join(PRE_TOKENIZERS)}:"
            " take a Hugging Face folder of the model, or add the pattern to stages/formats/pre_tokenizers.py"
        )
    merges = [pair.split(" ") for pair in fields.get("tokenizer.ggml.merges", ())]
    known = [pair for pair in merges if len(pair) == 2 and {*pair, "".join(pair)} <= vocab.keys()]
    decoder = {"type": "ByteLevel", "add_prefix_space": True, "trim_offsets": True, "use_regex": True}
    model = {"type": "BPE", "dropout": None, "unk_token": None, "fuse_unk": False, "byte_fallback": False,
             "ignore_merges": pre in WHOLE_WORDS_FIRST, "vocab": vocab, "merges": known}  # fmt: skip
    normalizer = {"type": "NFC"} if PRE_TOKENIZERS[pre] is PRE_TOKENIZERS["qwen2"] else None
    return {"normalizer": normalizer, "pre_tokenizer": PRE_TOKENIZERS[pre], "decoder": decoder, "model": model}


def _with_byte_fallback(fields: dict[str, Any], vocab: dict[str, int], tokens: list[str]) -> dict[str, Any]:
    """SentencePiece's BPE joins, of all neighbours that make a token, those of the highest score first."""
    scores = fields.get("tokenizer.ggml.scores") or [-id for id in range(len(tokens))]
    pairs = [
        (-scores[id], vocab[token[:cut]], vocab[token[cut:]], (token[:cut], token[cut:]))
        for token, id in vocab.items()
        for cut in range(1, len(token))
        if token[:cut] in vocab and token[cut:] in vocab
    ]
    unknown = tokens[fields.get("tokenizer.ggml.unknown_token_id", 0)]
    space = {"type": "Replace", "pattern": {"String": " "}, "content": SPACE}
    first = [{"type": "Prepend", "prepend": SPACE}] if fields.get("tokenizer.ggml.add_space_prefix", True) else []
    strip = [{"type": "Strip", "content": " ", "start": 1, "stop": 0}] if first else []
    to_text = {"type": "Replace", "pattern": {"String": SPACE}, "content": " "}
    back = [to_text, {"type": "ByteFallback"}, {"type": "Fuse"}, *strip]
    return {
        "normalizer": {"type": "Sequence", "normalizers": [*first, space]},
        "pre_tokenizer": None,
        "decoder": {"type": "Sequence", "decoders": back},
        "model": {"type": "BPE", "dropout": None, "unk_token": unknown, "fuse_unk": True, "byte_fallback": True,
                  "vocab": vocab, "merges": [list(pair) for *_, pair in sorted(pairs)]},
    }  # fmt: skip


# ---- where it comes from


def _origin(fields: dict[str, Any], tensors: dict[str, Any], path: Path) -> str:
    told = [(key, fields.get(f"general.{key}")) for key in ("name", "organization", "basename", "license", "url")]
    kinds = sorted({tensor.tensor_type.name for tensor in tensors.values()})
    return "\n".join(
        [
            "# Where this model comes from",
            "",
            f"Written by Offramp from the GGUF file {path.name}, whose weights are {', '.join(kinds)}.",
            "They were turned into float32, and the tokenizer into tokenizer.json: files were changed, and the model's",
            "licence still applies.",
            "",
            f"- SHA-256 of the file: `{sha256_of(path)}`",
            *(f"- {key}, as the file says: {value}" for key, value in told if value),
            "",
        ]
    )


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("file", type=Path)
    parser.add_argument("folder", type=Path)
    given = parser.parse_args()
    try:
        print(folder_from_gguf(given.file, given.folder))
    except Refusal as refusal:
        sys.exit(f"gguf_import: {refusal}")
