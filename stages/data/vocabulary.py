"""A teacher's vocabulary cut down to the tokens that a corpus is made of (`teacher.trim_vocabulary`).

    kept = closed(tokenizer, used)             # ids: those in use, all that they are joined from, bytes, special tokens
    smaller = trimmed(tokenizer, kept)         # ids 0, 1, ... in the old order
    part = write_kept(folder, kept, tokenizer) # of the card; `read_kept` reads it

Byte pair encoding applies, of all merges that fit, the one that stands first. A text whose tokens are all kept is split
as before: every merge on the way to them is kept, so at each step the smaller tokenizer has some of the merges that
fit, among them the one that was applied. Any other text falls into smaller pieces, at last into bytes.
"""

from collections.abc import Iterable
from pathlib import Path
from typing import Any

from stages.data.file_tokenizer import SPACE, FileTokenizer
from stages.data.shards import read_card
from stages.files.artifacts import Refusal, sha256_of, write_atomically

KEPT = "kept_ids.txt"  # line n, from 0 on: the id that token n has in the teacher's own vocabulary


def closed(tokenizer: FileTokenizer, used: Iterable[int]) -> list[int]:
    """The ids to keep so that a text of the tokens `used` is split as before and no other text is lost."""
    model, ids = tokenizer.content["model"], tokenizer.ids
    parts: dict[str, list[str]] = {}
    for pair in merges_of(model):
        parts.setdefault("".join(pair), []).extend(pair)
    token_of = {id: token for token, id in ids.items()}
    always = [*tokenizer.byte_ids, tokenizer.end_of_text, ids.get(SPACE), ids.get(model.get("unk_token"))]
    waiting = [token_of[id] for id in (*used, *always) if id is not None]
    waiting += [added["content"] for added in tokenizer.content["added_tokens"] if added["special"]]
    kept: set[str] = set()
    while waiting:
        if (token := waiting.pop()) not in kept:
            kept.add(token)
            waiting += parts.get(token, ())
    return sorted(ids[token] for token in kept)


def trimmed(tokenizer: FileTokenizer, kept: list[int]) -> FileTokenizer:
    """The tokenizer with these tokens alone, under new ids in the old order; `kept` is what `closed` gives."""
    new = {tokenizer_id: at for at, tokenizer_id in enumerate(kept)}
    model = tokenizer.content["model"]
    vocab = {token: new[id] for token, id in model["vocab"].items() if id in new}
    pairs = zip(model["merges"], merges_of(model), strict=True)
    merges = [merge for merge, pair in pairs if "".join(pair) in vocab]
    added = [(token, tokenizer.ids[token["content"]]) for token in tokenizer.content["added_tokens"]]
    content = tokenizer.content | {
        "model": model | {"vocab": vocab, "merges": merges},
        "added_tokens": [token | {"id": new[id]} for token, id in added if id in new],
    }
    smaller = FileTokenizer(tokenizer.path, len(kept), new[tokenizer.end_of_text], content)
    if [smaller.bytes_of([at]) for at in range(len(kept))] != [tokenizer.bytes_of([id]) for id in kept]:
        raise Refusal(f"{tokenizer.path}: two of its tokens share an id, so it is not trimmed: set"
                      " teacher.trim_vocabulary to false")  # fmt: skip
    return smaller


def merges_of(model: dict[str, Any]) -> list[list[str]]:
    """The pairs of a BPE model, which older files have as one text with a space between."""
    return [merge if isinstance(merge, list) else merge.split(" ") for merge in model["merges"]]


def write_kept(folder: Path, kept: list[int], tokenizer: FileTokenizer) -> dict[str, Any]:
    """`tokenizer` is the whole one."""
    write_atomically(folder / KEPT, "".join(f"{id}\n" for id in kept))
    return {"vocab_size": tokenizer.vocab_size, "file": KEPT, "sha256": sha256_of(folder / KEPT)}


def read_kept(data: Path) -> tuple[list[int], int] | None:
    """The teacher's own ids of the tokens in a data folder, and how many it has; None: they are those of the folder."""
    if (part := read_card(data).get("trimmed")) is None:
        return None
    path = data / part["file"]
    if not path.is_file() or sha256_of(path) != part["sha256"]:
        raise Refusal(f"{path} is not the file that was written: delete {data} and run dvc repro")
    return list(map(int, path.read_text().split())), part["vocab_size"]
