"""The stage as a whole on a tiny checkout of untrained models: what it writes, resumes and refuses."""

import csv
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from stages import evaluate, scoring, shards
from stages.artifacts import Refusal, read_json
from stages.generation import generate
from stages.models import build_student, build_teacher, save
from stages.runs import Place

VOCAB = shards.BytesTokenizer.vocab_size
LINE = "def double(value):\n    return value + value  # line {}\n"


class SilentRun:
    def __init__(self):
        self.logged = {}

    def metrics(self, values, step=None):
        self.logged |= values

    def text(self, name, text):
        self.logged[name] = text


def write_data(folder: Path) -> None:
    """A byte-level corpus whose documents differ in length, in the folder that `prepare` would write."""
    tokenizer, splits = shards.BytesTokenizer(), {}
    folder.mkdir(parents=True)
    for split, count in (("train", 4), ("val", 2), ("test", 6)):
        texts = ["".join(LINE.format(i * n) for i in range(3 + n)) for n in range(count)]
        documents = [(tokenizer.encode(text), len(text.encode())) for text in texts]
        splits[split] = shards.write_split(folder, split, documents, tokenizer, 4096)
    (folder / shards.TOKENIZER).write_text(tokenizer.to_json())
    shards.write_card(folder, {
        "vocab_size": VOCAB, "end_of_text": tokenizer.end_of_text, "tokenizer": "bytes",
        "tokenizer_sha256": shards.sha256_of(folder / shards.TOKENIZER), "dtype": "uint16", "splits": splits,
    })  # fmt: skip


@pytest.fixture(scope="module")
def settings(tiny_settings):
    quick = replace(tiny_settings.evaluate, timing_repetitions=2, decode_tokens=4, bootstrap_resamples=50)
    return replace(tiny_settings, evaluate=quick)


@pytest.fixture(scope="module")
def checkout(tmp_path_factory, settings) -> Path:
    root = tmp_path_factory.mktemp("checkout")
    write_data(root / "artifacts/data")
    for index, name in enumerate(evaluate.MODELS):
        if "teacher" in name:
            shape = replace(settings.teacher, dense_width=64 if name == "sparse_teacher" else 128)
            model = build_teacher(shape, VOCAB, settings.sequence_tokens, seed=index)
        else:
            shape = replace(settings.student, mlp_width=48 if name == "sparse_student" else 96)
            model = build_student(shape, VOCAB, settings.sequence_tokens, seed=index)
        save(model, root / "artifacts" / name)
    return root


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    """As in all tests: two threads on two busy cores wait for each other most of the time."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(evaluate, "cores", lambda: 1)
        yield


@pytest.fixture(scope="module")
def evaluated(checkout, settings):
    run = SilentRun()
    evaluate.main(settings, Place(checkout, checkout), run)
    return SimpleNamespace(root=checkout, metrics=read_json(checkout / "metrics/evaluate.json"), run=run)


def outs_of(root: Path) -> dict[str, bytes]:
    files = [
        root / "metrics/evaluate.json",
        root / "plots/quality.csv",
        *(root / "artifacts/scores").iterdir(),
    ]
    return {path.name: path.read_bytes() for path in sorted(files)}


def test_every_model_has_its_figures_inside_their_intervals(evaluated):
    assert set(evaluated.metrics["models"]) == set(evaluate.MODELS)
    for model in evaluated.metrics["models"].values():
        for name in ("bits_per_byte", "top1_accuracy"):
            assert model[f"{name}_low"] <= model[name] <= model[f"{name}_high"]
        assert model["flops_per_token"] == model["counted_flops_per_token"]
        assert model["active_parameters"] <= model["parameters"]
    assert 7 < evaluated.metrics["models"]["student"]["bits_per_byte"] < 9, "an untrained model over bytes"
    assert "kl_to_teacher_nats" in evaluated.metrics["models"]["student"]


def test_each_comparison_follows_from_the_figures_and_stands_beside_its_control(evaluated):
    bits = {name: model["bits_per_byte"] for name, model in evaluated.metrics["models"].items()}
    compared = evaluated.metrics["comparisons"]
    student = compared["student"]
    assert student["quality_kept"] == pytest.approx(bits["teacher"] / bits["student"], rel=1e-5)
    assert student["control_quality_kept"] == pytest.approx(bits["teacher"] / bits["control"], rel=1e-5)
    assert (student["gap_closed"] is None) == bool(student["gap_closed_reason"])
    for name in ("teacher", "student"):
        sparse = compared[f"sparse_{name}"]
        assert sparse["quality_lost"] == pytest.approx(bits[f"sparse_{name}"] / bits[name] - 1, abs=1e-5)
        assert sparse["continued_quality_lost"] == pytest.approx(
            bits[f"continued_{name}"] / bits[name] - 1, abs=1e-5
        )
        assert 0 < sparse["flops_cut"] < 1


def test_the_scores_of_documents_give_the_metrics(evaluated):
    for name, model in evaluated.metrics["models"].items():
        table = np.load(evaluated.root / f"artifacts/scores/{name}.npy")
        assert scoring.bits_per_byte(table) == pytest.approx(model["bits_per_byte"], rel=1e-5)
        assert len(table) == evaluated.metrics["test"]["documents"] == 6


def test_the_plot_has_a_row_per_model(evaluated):
    rows = list(csv.DictReader((evaluated.root / "plots/quality.csv").open()))
    assert [row["model"] for row in rows] == list(evaluate.MODELS)
    assert list(rows[0]) == ["model", "flops_per_token", "bits_per_byte", "low", "high"]


def test_what_hangs_on_the_clock_is_measured_apart(evaluated):
    measured = read_json(evaluated.root / "measurements/evaluate.json")
    assert set(measured["latency"]) == set(evaluate.MODELS)
    for row in measured["latency"].values():
        assert row["prefill_seconds"] > 0 and row["decode_seconds_per_token"] > 0
        assert row["prefill_peak_bytes"] > row["weight_bytes"] > 0
    assert measured["checkpointing"].keys() == {row["policy"] for row in evaluated.metrics["checkpointing"]}
    assert measured["checkpointing"]["none"]["step_seconds_ratio"] == 1
    assert measured["router"]["ratio_low"] <= measured["router"]["ratio"] <= measured["router"]["ratio_high"]
    assert "seconds" not in json.dumps(evaluated.metrics), "no clock in what DVC keeps"


def test_the_samples_continue_one_prompt(evaluated):
    texts = read_json(evaluated.root / "artifacts/samples.json")
    assert set(texts) == set(evaluate.MODELS)
    assert all(text.startswith(LINE.format(0)[: evaluate.SAMPLE_PROMPT_TOKENS]) for text in texts.values())


def test_the_run_hears_of_the_headline_figures(evaluated):
    bits = evaluated.metrics["models"]["student"]["bits_per_byte"]
    assert evaluated.run.logged["student_bits_per_byte"] == pytest.approx(bits, rel=1e-5)


def test_a_second_evaluation_gives_the_same_bytes(evaluated, settings, tmp_path):
    evaluate.main(settings, Place(evaluated.root, tmp_path), SilentRun())
    assert outs_of(tmp_path) == outs_of(evaluated.root)


KILLED = """
import sys, time
from pathlib import Path
from stages import evaluate, scoring
from stages.runs import Place
original, plain = scoring.score, scoring.window_scores
def slow(*arguments):
    time.sleep(0.3)
    return plain(*arguments)
scoring.window_scores = slow
evaluate.cores = lambda: 1
scoring.score = lambda *a, **named: original(*a, **named, save_every_seconds=0)
settings = evaluate_settings()
class Run:
    metrics = text = lambda *a, **k: None
evaluate.main(settings, Place(Path(sys.argv[1]), Path(sys.argv[2])), Run())
"""


def test_an_evaluation_killed_in_the_middle_resumes_and_gives_the_same_bytes(evaluated, settings, tmp_path):
    """kill -9 while windows are scored; the next run starts from what was saved, not from nothing."""
    composed = (
        "from stages.settings import compose, validate\nfrom dataclasses import replace\n"
        "def evaluate_settings():\n"
        "    s = validate(compose(['scale=tiny', 'corpus=stdlib']))\n"
        "    return replace(s, evaluate=replace(s.evaluate, timing_repetitions=2, decode_tokens=4,"
        " bootstrap_resamples=50, batch_sequences=2))\n"
    )
    settings = replace(settings, evaluate=replace(settings.evaluate, batch_sequences=2))
    root, out = tmp_path / "checkout", tmp_path / "out"
    shutil.copytree(evaluated.root / "artifacts", root / "artifacts")
    environment = os.environ | {"PYTHONPATH": str(Path(__file__).parent.parent)}
    child = subprocess.Popen([sys.executable, "-c", composed + KILLED, root, out], env=environment)
    resume = root / ".runs/resume/evaluate"
    deadline = time.monotonic() + 60
    while not list(resume.glob("*/progress")) and time.monotonic() < deadline and child.poll() is None:
        time.sleep(0.01)
    child.send_signal(signal.SIGKILL)
    child.wait()
    (state,) = resume.iterdir()
    assert (state / "progress").exists()
    assert not (out / "metrics/evaluate.json").exists()

    counts, original = {"resumed": 0, "whole": 0}, scoring.window_scores
    for name in counts:

        def counted(*arguments, name=name):
            counts[name] += 1
            return original(*arguments)

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(scoring, "window_scores", counted)
            evaluate.main(settings, Place(root, tmp_path / name), SilentRun())
    assert outs_of(tmp_path / "resumed") == outs_of(tmp_path / "whole")
    assert 0 < counts["resumed"] < counts["whole"], "what was scored before the kill is not scored again"
    assert not list(resume.iterdir()), "a finished evaluation leaves no state behind"


def test_progress_of_other_models_or_settings_is_never_used(evaluated, settings):
    place = Place(evaluated.root, evaluated.root)
    key = evaluate.resume_key(settings, place)
    assert key == evaluate.resume_key(settings, place)
    other = replace(settings, evaluate=replace(settings.evaluate, test_tokens=100))
    assert key != evaluate.resume_key(other, place)


def test_models_of_another_vocabulary_are_refused(evaluated, settings, tmp_path):
    shutil.copytree(evaluated.root / "artifacts", tmp_path / "artifacts")
    shutil.rmtree(tmp_path / "artifacts/control")
    save(build_student(settings.student, 512, 64, seed=1), tmp_path / "artifacts/control")
    with pytest.raises(Refusal, match="artifacts/control speaks a vocabulary of 512"):
        evaluate.main(settings, Place(tmp_path, tmp_path), SilentRun())


def test_a_missing_model_is_refused_by_name(evaluated, settings, tmp_path):
    shutil.copytree(evaluated.root / "artifacts/data", tmp_path / "artifacts/data")
    with pytest.raises(Refusal, match="teacher"):
        evaluate.main(settings, Place(tmp_path, tmp_path), SilentRun())


@pytest.mark.parametrize("kind", ["teacher", "student"])
@pytest.mark.parametrize("temperature", [0.0, 0.8])
def test_generation_with_a_cache_writes_what_generation_without_one_writes(settings, kind, temperature):
    build = build_teacher if kind == "teacher" else build_student
    model = build(getattr(settings, kind), VOCAB, 64, seed=1).eval()
    with torch.no_grad():
        model.head.weight.mul_(20)  # far from uniform, so that rounding cannot decide
    prompt = [5, 9, 250, 31]
    cached, plain = (generate(model, prompt, 12, cache, temperature, seed=4) for cache in (True, False))
    assert cached == plain and len(cached) == 12
    assert generate(model, prompt, 12, temperature=temperature, seed=4) == cached


def test_generation_stops_before_the_end_of_text(settings):
    model = build_student(settings.student, VOCAB, 64, seed=1).eval()
    first = generate(model, [5, 9], 1)
    assert generate(model, [5, 9], 8, end_of_text=first[0]) == []
    with pytest.raises(ValueError, match="at least one token"):
        generate(model, [], 3)
