"""The test split as a task of lm-evaluation-harness: its figure is ours over its windows, with no network."""

import json
import math
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from test_model_folder import WIDE, completed
from test_shards import BPE, TEXTS, folder_of
from test_student import SHAPE

from stages.data.shards import read_card, write_card
from stages.files.artifacts import Refusal
from stages.formats.lm_eval_task import texts_of, write_task
from stages.model.hub import load

LENGTH = 16  # of a window


def test_the_task_has_the_documents_as_they_were_read(tmp_path):
    completed(tmp_path, replace(SHAPE, **WIDE))
    assert list(texts_of(tmp_path / "artifacts/data", "test")) == TEXTS
    path = write_task(tmp_path / "artifacts/data", tmp_path / "tasks", documents=3)
    task = yaml.safe_load(path.read_text())
    lines = Path(task["dataset_kwargs"]["data_files"]["test"]).read_text(encoding="utf-8").splitlines()
    texts = [json.loads(line)["text"] for line in lines]
    assert texts == [text for text in TEXTS if text][:3], "an empty text has nothing to score"


def test_a_text_that_its_tokens_do_not_give_back_is_refused(tmp_path):
    completed(tmp_path, replace(SHAPE, **WIDE))
    table = tmp_path / "artifacts/data/test-documents.npy"
    rows = np.load(table)
    rows[0, 2] += 1
    np.save(table, rows)
    from stages.files.artifacts import sha256_of

    card = {key: value for key, value in read_card(table.parent).items() if key != "sha256"}
    card["splits"]["test"]["documents_table"]["sha256"] = sha256_of(table)
    write_card(table.parent, card)
    with pytest.raises(Refusal, match="has tokens of"):
        list(texts_of(table.parent, "test"))


def rolling_windows(ids):
    """As the harness cuts a text: (tokens read, how many of the last ones are scored)."""
    row = [BPE.end_of_text, *ids]
    for first in range(0, len(ids), LENGTH):
        last = min(first + LENGTH, len(ids))
        yield row[max(0, last - LENGTH) : last + 1], last - first


def test_bits_per_byte_are_ours_over_its_windows(tmp_path):
    for module in ("lm_eval", "accelerate"):
        pytest.importorskip(module, reason="the extra score is not installed")
    import lm_eval
    from lm_eval.models.huggingface import HFLM
    from lm_eval.tasks import TaskManager

    folder = completed(tmp_path, replace(SHAPE, **WIDE))
    texts = [*TEXTS, "[1, 'a list']", "{{text}}\n", "\u2028 line"]
    write_task(folder_of(tmp_path / "artifacts/data", BPE, texts), tmp_path / "tasks")
    scored = HFLM(pretrained=str(folder), device="cpu", batch_size=1, max_length=LENGTH, softmax_dtype="float64")
    manager = TaskManager(include_path=str(tmp_path / "tasks"), include_defaults=False)
    done = lm_eval.simple_evaluate(scored, tasks=["offramp_test"], task_manager=manager, bootstrap_iters=0)
    theirs = done["results"]["offramp_test"]["bits_per_byte,none"]

    model, nats = load(folder), 0.0
    for text in texts:
        for row, count in rolling_windows(BPE.encode(text)):
            with torch.no_grad():
                logits_TV = model(torch.tensor([row[:-1]]))[0].double()
            picked_T = logits_TV.log_softmax(-1).gather(1, torch.tensor(row[1:])[:, None])[:, 0]
            nats -= picked_T[-count:].sum().item()
    ours = nats / math.log(2) / sum(len(text.encode()) for text in texts)
    assert theirs == pytest.approx(ours, rel=1e-9) and theirs > 1
