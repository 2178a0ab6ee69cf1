"""How words are split before their pieces are merged, by llama.cpp's names: a GGUF file has these, not the pattern.

The patterns are those of the models that the names stand for: OpenAI's GPT-2, SmolLM and StarCoder (each digit alone),
Qwen 2 to 3, Llama 3.
"""

from typing import Any

_BYTES = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True}
GPT2: dict[str, Any] = _BYTES | {"use_regex": True}
DIGITS = {"type": "Sequence", "pretokenizers": [{"type": "Digits", "individual_digits": True}, GPT2]}


def _split_by(numbers: str) -> dict[str, Any]:
    pattern = (
        r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|" + numbers + r"| ?[^\s\p{L}\p{N}]+[\r\n]*"
        r"|\s*[\r\n]+|\s+(?!\S)|\s+"
    )
    split = {"type": "Split", "pattern": {"Regex": pattern}, "behavior": "Isolated", "invert": False}
    return {"type": "Sequence", "pretokenizers": [split, _BYTES | {"use_regex": False}]}


QWEN, LLAMA3 = _split_by(r"\p{N}"), _split_by(r"\p{N}{1,3}")
PRE_TOKENIZERS = {
    "gpt-2": GPT2,
    "smollm": DIGITS,
    "starcoder": DIGITS,
    "qwen2": QWEN,
    "deepseek-r1-qwen": QWEN,
    "llama-bpe": LLAMA3,
}
WHOLE_WORDS_FIRST = ("llama-bpe",)  # a word that is a token needs no merges (`ignore_merges`)


def name_of(content: dict) -> str | None:
    """llama.cpp's name of how a tokenizer.json splits words; None where none of these is the same.

    Without merges it does not matter where words are split.
    """
    if content["normalizer"] not in (None, {"type": "NFC"}):  # llama.cpp does not apply NFC
        return None
    pattern = _alike(content["pre_tokenizer"])
    if not content["model"]["merges"] and pattern in (_alike(GPT2), _alike(GPT2 | {"use_regex": False})):
        return "gpt-2"
    for name, known in PRE_TOKENIZERS.items():
        first = bool(content["model"].get("ignore_merges")) == (name in WHOLE_WORDS_FIRST)
        if first and pattern == _alike(known):
            return name
    return None


def _alike(pattern: Any) -> Any:
    """Without `trim_offsets`, which changes no token."""
    if isinstance(pattern, dict):
        return {key: _alike(value) for key, value in pattern.items() if key != "trim_offsets"}
    return [_alike(part) for part in pattern] if isinstance(pattern, list) else pattern
