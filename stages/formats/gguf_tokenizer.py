"""The tokenizer of a model folder as GGUF has it: byte-level BPE by its merges, `▁` with byte fallback by scores."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from stages.data.hub_tokenizer import load_hub_tokenizer
from stages.data.shards import TOKENIZER
from stages.data.vocabulary import merges_of
from stages.files.artifacts import Refusal, read_json
from stages.files.extras import extra
from stages.formats.pre_tokenizers import name_of

# llama.cpp loads no tokenizer without merges, which plain bytes have not. What this one makes is no token, and a piece
# that is no token falls back to its bytes.
NO_MERGE = "Z Z"
_BYTE = re.compile(r"<0x[0-9A-F]{2}>")


def add_tokenizer(writer: Any, folder: Path, vocab_size: int) -> None:
    """Special tokens become control tokens, which no text can spell. What llama.cpp splits otherwise is refused."""
    (gguf,) = extra("gguf", "gguf")
    tokenizer, path = load_hub_tokenizer(folder, vocab_size), folder / TOKENIZER
    content, kind = read_json(path), gguf.TokenType
    pre, spaced = name_of(content), _joins_spaces(content)
    if pre is None and not spaced:
        raise Refusal(f"{path}: no GGUF of it: its word pattern has no name in stages/formats/pre_tokenizers.py")
    merges = merges_of(content["model"])
    ids = content["model"]["vocab"] | {added["content"]: added["id"] for added in content["added_tokens"]}
    kinds = {token: kind.BYTE if spaced and _BYTE.fullmatch(token) else kind.NORMAL for token in ids}
    for added in content["added_tokens"]:
        kinds[added["content"]] = kind.CONTROL if added["special"] else kind.USER_DEFINED
    for beyond in set(range(vocab_size)) - set(ids.values()):  # rows of a padded embedding
        ids[f"[PAD{beyond}]"], kinds[f"[PAD{beyond}]"] = beyond, kind.UNUSED
    if spaced:
        kinds[content["model"]["unk_token"]] = kind.UNKNOWN
        writer.add_tokenizer_model("llama")
        writer.add_unk_token_id(ids[content["model"]["unk_token"]])
    else:
        writer.add_tokenizer_model("gpt2")
        writer.add_tokenizer_pre(pre)
    tokens = sorted(ids, key=ids.__getitem__)
    writer.add_token_list(tokens)
    if spaced:
        writer.add_token_scores(_scores(tokens, merges))
    writer.add_token_types([kinds[token] for token in tokens])
    if not spaced:
        writer.add_token_merges([" ".join(pair) for pair in merges] or [NO_MERGE])
    writer.add_eos_token_id(tokenizer.end_of_text)
    writer.add_pad_token_id(tokenizer.end_of_text)
    writer.add_add_bos_token(False)
    writer.add_add_space_prefix(tokenizer.prefix_bytes > 0)


def _joins_spaces(content: dict) -> bool:
    """Whether it is SentencePiece's BPE, which splits no words before it joins pieces."""
    model, pattern = content["model"], content["pre_tokenizer"]
    whole = pattern is None or (pattern["type"] == "Metaspace" and not pattern.get("split", True))
    known = model["type"] == "BPE" and model.get("byte_fallback") and model.get("unk_token") in model["vocab"]
    return bool(whole and known and not model.get("ignore_merges"))


def _scores(tokens: list[str], merges: list[list[str]]) -> list[float]:
    """llama.cpp joins the neighbours that make the token of the highest score: the earlier merge has the higher one."""
    rank: dict[str, int] = {}
    for number, pair in enumerate(merges):
        rank.setdefault("".join(pair), number)
    return [-float(rank.get(token, len(merges))) for token in tokens]
