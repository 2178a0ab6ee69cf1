"""The tokenizer of a data folder as a Hugging Face model folder holds it, and its reader.

AutoTokenizer needs tokenizer.json and tokenizer_config.json: without the second it takes the class that config.json's
model type usually has, and splits text otherwise, without a word.
"""

import json
from pathlib import Path

from stages.data.shards import (
    END_OF_TEXT,
    TOKENIZER,
    BpeTokenizer,
    BytesTokenizer,
    byte_alphabet,
    load_tokenizer,
    read_card,
)
from stages.files.artifacts import Refusal

TOKENIZER_CONFIG, GENERATION_CONFIG = "tokenizer_config.json", "generation_config.json"
NEW_TOKENS = 64  # that transformers' generate writes where nobody says how many


def tokenizer_files(data: Path, sequence_tokens: int) -> dict[str, str]:
    """The files by name that let transformers read and write text as the stages do.

    `data` is the folder that `prepare` wrote; `sequence_tokens` is the length that the model was trained on. A damaged
    tokenizer is refused.
    """
    tokenizer = load_tokenizer(data)
    whole = (data / TOKENIZER).read_text(encoding="utf-8") if tokenizer.kind == "bpe" else _bytes_as_bpe()
    end = read_card(data)["end_of_text"]
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "eos_token": END_OF_TEXT,
        "pad_token": END_OF_TEXT,
        "bos_token": None,
        "unk_token": None,
        "model_max_length": sequence_tokens,
        "clean_up_tokenization_spaces": False,
        "split_special_tokens": True,  # text that spells <|endoftext|> is text, as in `BpeTokenizer`
    }
    generation = {"bos_token_id": None, "eos_token_id": end, "pad_token_id": end}
    generation |= {"do_sample": False, "max_new_tokens": NEW_TOKENS}
    return {TOKENIZER: whole, TOKENIZER_CONFIG: _json(config), GENERATION_CONFIG: _json(generation)}


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


def load_hub_tokenizer(folder: Path, vocab_size: int) -> BpeTokenizer:
    """The tokenizer beside a model whose embedding has this many rows; a file that does not fit it is refused."""
    from tokenizers import Tokenizer

    path = folder / TOKENIZER
    if not path.is_file():
        raise Refusal(f"{path} is missing: run the stage that writes the model (dvc repro)")
    try:
        tokenizer = BpeTokenizer(Tokenizer.from_file(str(path)), vocab_size)
    except KeyError:
        raise Refusal(f"{path} is no byte-level BPE, the only kind that is read here") from None
    except Exception as error:  # the library raises no narrower type
        raise Refusal(f"{path} is no tokenizer: {' '.join(str(error).split())[:200]}") from None
    if tokenizer.end_of_text is None:
        raise Refusal(f"{path} has no token {END_OF_TEXT}: it is not the tokenizer of this project's models")
    if tokenizer.vocab_size > vocab_size:  # embeddings may be padded, to a multiple that hardware likes
        raise Refusal(f"{path} has {tokenizer.vocab_size} tokens, the model {vocab_size}: they do not belong together")
    return tokenizer
