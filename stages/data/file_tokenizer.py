"""Any tokenizer.json whose pieces of text can be given back byte by byte: byte-level BPE, and ▁ with byte fallback.

    tokenizer = FileTokenizer(Path("teacher/tokenizer.json"), vocab_size=49152, end_of_text="<|endoftext|>")
    tokenizer.encode("def main(")

It is read as it is but for what would change text, or put into it what nobody wrote:

- NFC is not applied. Text that is in NFC, as nearly all is, has the same tokens with and without it.
- No special token is added, and text that spells one is text.
- A tokenizer that puts a space before a text does so before every text, also one that begins with a space. It counts no
  byte (`prefix_bytes`).
- "▁", which stands for a space inside such a tokenizer, is written as its three bytes where the text itself has it.

What would still lose text is refused: by name when the file is read, and by the first text that does not come back.
"""

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from stages.data.shards import ODD_BYTES, byte_alphabet
from stages.files.artifacts import Refusal

# In this order; an instruct model's eos_token is often the end of a chat message, and is not asked.
ENDS_OF_TEXT = ("<|endoftext|>", "<|end_of_text|>", "<｜end▁of▁sentence｜>", "</s>", "<eos>")
SPACE = "▁"  # U+2581, which stands for a space where a tokenizer is not byte-level
# Bytes that tokenizers may lack, as their training text had none: control characters, leads of planes that nobody uses,
# and what never stands in UTF-8. A text that has one is refused when it comes.
RARE_BYTES = {*range(0x20), 0x7F, 0xC0, 0xC1, 0xF1, 0xF2, *range(0xF5, 0x100)} - set(b"\t\n\f\r")
_BYTE = re.compile(r"<0x([0-9A-F]{2})>")


class FileTokenizer:
    """`vocab_size` is the number of rows of the model's embedding; those beyond the tokenizer's stand for no byte."""

    kind = "file"

    def __init__(
        self, path: Path, vocab_size: int, end_of_text: str | int | None = None, content: dict[str, Any] | None = None
    ):
        """`end_of_text` is the token that ends a text, or its id; None: the first of `ENDS_OF_TEXT` that there is.

        `content` stands for that of the file, whose path is then for messages alone.
        """
        from tokenizers import Tokenizer

        content = _read(path) if content is None else content
        refuse_lossy(content, path)
        self.path, self.vocab_size = path, vocab_size
        self.content = _cleaned(content, vocab_size)
        bare, self._prefix = _without_prefix(self.content)
        self._tokenizer = Tokenizer.from_str(json.dumps(bare))
        self._tokenizer.encode_special_tokens = True  # not kept in tokenizer.json, hence set at each load
        self.prefix_bytes = len(self._prefix)
        self.ids = ids = self._tokenizer.get_vocab()
        if (most := max(ids.values(), default=-1)) >= vocab_size:
            raise Refusal(
                f"{path} has ids up to {most:,}, the model's embedding {vocab_size:,} rows: they do not belong together"
            )
        self.end_of_text = _end_of_text(ids, end_of_text, path)
        self._spaced = not _is_byte_level(bare)
        self.byte_ids = [ids.get(token) for token in (byte_tokens() if self._spaced else byte_alphabet())]
        if lacking := [byte for byte, id in enumerate(self.byte_ids) if id is None and byte not in RARE_BYTES]:
            raise Refusal(f"{path} has no token for the byte 0x{lacking[0]:02X}: a text that has it would be lost")
        added = {token["content"]: token for token in self.content["added_tokens"]}
        self._bytes = self._bytes_of_ids(ids, added)
        self._marks: list[str] = []
        if bare["model"].get("type") == "Unigram":  # it looks for its pieces anywhere, also for special ones and bytes
            special = {text for text, token in added.items() if token["special"]}
            self._marks = sorted(special | set(byte_tokens()), reverse=True)
        apart = [ODD_BYTES.pattern[1:-1], *([SPACE + "+"] if self._spaced else []), *map(re.escape, self._marks)]
        self._apart = re.compile(f"({'|'.join(apart)})")

    def _bytes_of_ids(self, ids: dict[str, int], added: dict[str, Any]) -> list[bytes]:
        byte_of = {character: byte for byte, character in enumerate(byte_alphabet())}
        found = [b""] * self.vocab_size
        for token, id in ids.items():
            if token in added and added[token]["special"]:
                found[id] = token.encode()
            elif self._spaced:
                byte = _BYTE.fullmatch(token)
                found[id] = bytes([int(byte[1], 16)]) if byte else token.replace(SPACE, " ").encode()
            elif token in added or not byte_of.keys() >= set(token):
                found[id] = token.encode()
            else:
                found[id] = bytes(byte_of[character] for character in token)
        return found

    def encode(self, text: str) -> list[int]:
        """Token ids. Bytes that are not UTF-8 may come as Python spells them (surrogateescape)."""
        ids: list[int] = []
        for piece in self._apart.split(self._prefix + text if text else ""):
            if piece in self._marks:
                ids += self._ids_of(piece[:1]) + self._ids_of(piece[1:])
            elif ODD_BYTES.fullmatch(piece) or (self._spaced and piece and not piece.strip(SPACE)):
                ids += [self._id_of_byte(byte) for byte in piece.encode("utf-8", "surrogateescape")]
            elif piece:
                ids += self._ids_of(piece)
        return ids

    def _ids_of(self, piece: str) -> list[int]:
        return self._tokenizer.encode(piece, add_special_tokens=False).ids

    def _id_of_byte(self, byte: int) -> int:
        if (id := self.byte_ids[byte]) is None:
            raise Refusal(f"{self.path} has no token for the byte 0x{byte:02X}: leave it out")
        return id

    def encode_batch(self, texts: list[str]) -> list[list[int]]:
        """Many valid texts at once, on every core. A text that its tokens do not give back is refused."""
        batch = [self._prefix + text if text else "" for text in texts]
        found = [encoding.ids for encoding in self._tokenizer.encode_batch_fast(batch, add_special_tokens=False)]
        for number, text in enumerate(texts):
            if self._spaced and self._apart.search(text):
                found[number] = self.encode(text)
            back, wanted = self.bytes_of(found[number])[self.prefix_bytes if text else 0 :], text.encode()
            if back != wanted:
                at = next((i for i, (a, b) in enumerate(zip(back, wanted, strict=False)) if a != b), len(back))
                raise Refusal(
                    f"{self.path} loses text: {wanted[max(0, at - 20) : at + 20]!r} comes back as"
                    f" {back[max(0, at - 20) : at + 20]!r}; leave the text that has it out, or take another teacher"
                )
        return found

    def bytes_of(self, ids: list[int]) -> bytes:
        """Of tokens from a text's beginning on, the first `prefix_bytes` are none of the text's."""
        return b"".join([self._bytes[id] for id in ids])

    def decode(self, ids: list[int]) -> str:
        return self.bytes_of(ids).decode("utf-8", errors="replace")

    def end_token(self) -> str:
        return str(self._tokenizer.id_to_token(self.end_of_text))

    def to_json(self) -> str:
        """What to keep: read again, or by transformers, it gives the same ids."""
        return json.dumps(self.content, ensure_ascii=False, indent=1) + "\n"


def byte_tokens() -> list[str]:
    """The tokens of byte fallback, by byte."""
    return [f"<0x{byte:02X}>" for byte in range(256)]


# ---- what is read, and what is not


def refuse_lossy(content: dict, path: Path) -> None:
    """Refuses, by name, a kind of tokenizer whose tokens do not give every text back."""
    model, what = content["model"], f"{path}: no tokenizer of this kind is read here:"
    kind = model.get("type") or "BPE"
    if kind not in ("BPE", "Unigram"):
        raise Refusal(f"{what} {kind} loses text; byte-level BPE, and BPE and Unigram with byte fallback, lose none")
    for key in ("continuing_subword_prefix", "end_of_word_suffix"):
        if model.get(key):
            raise Refusal(f"{what} its {key} {model[key]!r} marks words and loses the spaces between them")
    for part in _parts(content["normalizer"], "normalizers"):
        spaces = part["type"] == "Replace" and part["pattern"] == {"String": " "} and part["content"] == SPACE
        before = part["type"] == "Prepend" and part["prepend"] == SPACE
        if not (spaces or before or part["type"] == "NFC"):
            raise Refusal(f"{what} its normalizer {part['type']} changes text, so that bytes cannot be counted")
    for part in _parts(content["pre_tokenizer"], "pretokenizers"):
        whole = part["type"] in ("ByteLevel", "Digits", "Split", "Metaspace", "Punctuation")
        if not whole or part.get("behavior") == "Removed" or part.get("replacement", SPACE) != SPACE:
            raise Refusal(f"{what} its pre-tokenizer {part['type']} removes characters")
    if not _is_byte_level(content) and not model.get("byte_fallback"):
        raise Refusal(f"{what} it is not byte-level and has no byte fallback, so unknown characters are lost")


def _read(path: Path) -> dict[str, Any]:
    if not path.is_file():
        raise Refusal(f"{path} is missing: a model needs its tokenizer.json beside it (stages write it: dvc repro)")
    from tokenizers import Tokenizer

    try:
        text = path.read_text(encoding="utf-8")
        Tokenizer.from_str(text)  # it knows what must be there, and of which type
    except Exception as error:  # the library raises no narrower type
        raise Refusal(f"{path} is no tokenizer: {' '.join(str(error).split())[:200]}") from None
    content = json.loads(text)
    return {"normalizer": None, "pre_tokenizer": None, "added_tokens": [], "post_processor": None} | content


def _parts(section: dict | None, inside: str) -> Iterator[dict]:
    """A normalizer or pre-tokenizer, or those that a sequence has."""
    if section is not None:
        yield from section[inside] if section["type"] == "Sequence" else [section]


def _is_byte_level(content: dict) -> bool:
    return any(part["type"] == "ByteLevel" for part in _parts(content["pre_tokenizer"], "pretokenizers"))


def _end_of_text(ids: dict[str, int], wanted: str | int | None, path: Path) -> int:
    if isinstance(wanted, int):
        return wanted
    if wanted is not None:
        if wanted not in ids:
            raise Refusal(f"{path} has no token {wanted!r}: set teacher.end_of_text to the one that ends a text")
        return ids[wanted]
    for token in ENDS_OF_TEXT:
        if token in ids:
            return ids[token]
    raise Refusal(f"{path} has none of {', '.join(ENDS_OF_TEXT)}: name its end of a text by teacher.end_of_text")


# ---- as it is, but for what changes text


def _cleaned(content: dict, vocab_size: int) -> dict:
    """Without NFC, added marks, cut texts, chance, spaces that added tokens swallow, and marks beyond the embedding.

    Byte tokens are no special ones, though the library's trainers make them such: their bytes are of text.
    """
    model = content["model"] | ({"dropout": None} if "dropout" in content["model"] else {})
    pieces = (piece if isinstance(piece, str) else piece[0] for piece in model["vocab"])  # Unigram: with their scores
    bytes_of_model = {piece for piece in pieces if model.get("byte_fallback") and _BYTE.fullmatch(piece)}
    added = [
        token if token["special"] else token | {"lstrip": False, "rstrip": False}
        for token in content["added_tokens"]
        if (not token["special"] or token["id"] < vocab_size or token["content"] in ENDS_OF_TEXT)
        and token["content"] not in bytes_of_model
    ]
    post = content["post_processor"]
    return content | {
        "truncation": None,
        "padding": None,
        "added_tokens": added,
        "normalizer": _without(content["normalizer"], "normalizers", "NFC"),
        "post_processor": post if post and post["type"] == "ByteLevel" else None,
        "model": model,
    }


def _without(section: dict | None, inside: str, kind: str) -> dict | None:
    left = [part for part in _parts(section, inside) if part["type"] != kind]
    if section is None or not left:
        return None
    return section | {inside: left} if section["type"] == "Sequence" else section


def _without_prefix(content: dict) -> tuple[dict, str]:
    """The same without the space that it puts before a text, and that space ("" where it puts none)."""
    prefix = ""
    if any(part["type"] == "Prepend" for part in _parts(content["normalizer"], "normalizers")):
        prefix = " "
    split = json.loads(json.dumps(content["pre_tokenizer"]))
    for part in _parts(split, "pretokenizers"):
        if part["type"] == "Metaspace":
            before = "always" if part.pop("add_prefix_space", True) else "never"  # as files said it before 2024
            prefix = " " if part.get("prepend_scheme", before) != "never" else prefix
            part["prepend_scheme"] = "never"
        elif part["type"] == "ByteLevel":
            prefix = " " if part.get("add_prefix_space", True) else prefix
            part["add_prefix_space"] = False
    bare = {"pre_tokenizer": split, "normalizer": _without(content["normalizer"], "normalizers", "Prepend")}
    return content | bare, prefix
