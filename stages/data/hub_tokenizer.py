"""The tokenizer of a data folder as a Hugging Face model folder holds it, and its reader.

AutoTokenizer needs tokenizer.json and tokenizer_config.json: without the second it takes the class that config.json's
model type usually has, and splits text otherwise, without a word.
"""

import json
from pathlib import Path

from stages.data.file_tokenizer import FileTokenizer
from stages.data.shards import (
    END_OF_TEXT,
    TOKENIZER,
    BytesTokenizer,
    byte_alphabet,
    load_tokenizer,
    read_card,
)
from stages.files.artifacts import read_json

TOKENIZER_CONFIG, GENERATION_CONFIG = "tokenizer_config.json", "generation_config.json"
OWN_END = "offramp_end_of_text"  # in TOKENIZER_CONFIG, where the end of a text is another than `END_OF_TEXT`
NEW_TOKENS = 64  # that transformers' generate writes where nobody says how many


def tokenizer_files(data: Path, sequence_tokens: int) -> dict[str, str]:
    """The files by name that let transformers read and write text as the stages do.

    `data` is the folder that `prepare` wrote; `sequence_tokens` is the length that the model was trained on. A damaged
    tokenizer is refused.
    """
    tokenizer = load_tokenizer(data)
    content = _bytes_as_bpe() if tokenizer.kind == "bytes" else (data / TOKENIZER).read_text(encoding="utf-8")
    token = tokenizer.end_token() if isinstance(tokenizer, FileTokenizer) else END_OF_TEXT
    return files_of(content, token, read_card(data)["end_of_text"], sequence_tokens)


def files_of(content: str, token: str, end: int, sequence_tokens: int) -> dict[str, str]:
    """As `tokenizer_files`, of a tokenizer.json that is in no data folder; `token`, whose id is `end`, ends a text."""
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "eos_token": token,
        "pad_token": token,
        "bos_token": None,
        "unk_token": None,
        "model_max_length": sequence_tokens,
        "clean_up_tokenization_spaces": False,
        "split_special_tokens": True,  # text that spells <|endoftext|> is text, as in `BpeTokenizer`
    } | ({} if token == END_OF_TEXT else {OWN_END: token})
    generation = {"bos_token_id": None, "eos_token_id": end, "pad_token_id": end}
    generation |= {"do_sample": False, "max_new_tokens": NEW_TOKENS}
    return {TOKENIZER: content, TOKENIZER_CONFIG: _json(config), GENERATION_CONFIG: _json(generation)}


def _json(value: dict) -> str:
    return json.dumps(value, sort_keys=True, indent=1) + "\n"


def _bytes_as_bpe() -> str:
    """`BytesTokenizer` in the library's terms: byte-level BPE without merges, whose ids are the bytes themselves."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

    tokenizer = Tokenizer(models.BPE(vocab={token: byte for byte, token in enumerate(byte_alphabet())}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(END_OF_TEXT, special=True, normalized=False)])
    assert tokenizer.token_to_id(END_OF_TEXT) == BytesTokenizer.end_of_text
    return tokenizer.to_str(pretty=True) + "\n"


def load_hub_tokenizer(folder: Path, vocab_size: int, end_of_text: str | None = None) -> FileTokenizer:
    """The tokenizer beside a model whose embedding has this many rows; a file that does not fit it is refused.

    `end_of_text` is the token that ends a text; None: as a model of this project says, else it is looked for.
    """
    if end_of_text is None and (folder / TOKENIZER_CONFIG).is_file():
        config = read_json(folder / TOKENIZER_CONFIG)
        end_of_text = config.get(OWN_END) if isinstance(config, dict) else None
    return FileTokenizer(folder / TOKENIZER, vocab_size, end_of_text)
