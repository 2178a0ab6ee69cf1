"""The test split as a task of EleutherAI's lm-evaluation-harness, which so scores any model that it can load.

    python -m stages.formats.lm_eval_task artifacts/data tasks            # writes tasks/offramp_test.yaml and .jsonl
    lm_eval --model hf --model_args pretrained=artifacts/student --tasks offramp_test --include_path tasks

It needs no network. The harness scores each document alone, led by the token that ends a text, and moves the last
window back until it is full; `evaluate` scores one stream of windows. So its bits per byte are some thousandths lower:
compare models by one of the two, never one with the other.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterator
from pathlib import Path

from stages.data.shards import Tokens, load_tokenizer
from stages.files.artifacts import Refusal, write_atomically

TASK = "offramp_test"
# A column's name as the target: in a template, a text from [ to ] would be read as a Python list.
TEMPLATE = """# The test split of an Offramp run. Written by: python -m stages.formats.lm_eval_task
task: {task}
dataset_path: json
dataset_kwargs: {{data_files: {{test: {texts}}}}}
output_type: loglikelihood_rolling
test_split: test
doc_to_text: ""
doc_to_target: text
metric_list: [{{metric: bits_per_byte}}]
metadata: {{version: 1}}
"""


def write_task(data: Path, out: Path, documents: int | None = None, split: str = "test") -> Path:
    """Writes the first `documents` of a split (None: all), by checksum a fair sample, and returns the YAML file."""
    texts = [text for text in texts_of(data, split) if text][:documents]
    lines = [json.dumps({"text": text}, ensure_ascii=False) for text in texts]
    write_atomically(out / f"{TASK}.jsonl", "\n".join(lines) + "\n")
    path = out / f"{TASK}.yaml"
    write_atomically(path, TEMPLATE.format(task=TASK, texts=json.dumps(str((out / f"{TASK}.jsonl").resolve()))))
    return path


def texts_of(data: Path, split: str) -> Iterator[str]:
    """The documents of a split, from their tokens; text that is not valid Unicode is refused."""
    tokens, tokenizer = Tokens(data, split), load_tokenizer(data)
    for start, count, size in tokens.documents.tolist():
        ids = tokens.window(start, count - 1).tolist()
        content = tokenizer.bytes_of(ids)[tokenizer.prefix_bytes if ids else 0 :]
        if len(content) != size:
            raise Refusal(f"{data}: a document of {size:,} bytes has tokens of {len(content):,}: run dvc repro prepare")
        yield content.decode("utf-8")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("data", type=Path)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--documents", type=int, help="so many of the split; else all")
    given = parser.parse_args()
    try:
        print(write_task(given.data, given.folder, given.documents))
    except Refusal as refusal:
        sys.exit(f"lm_eval_task: {refusal}")
