"""The stage as a whole on a tiny checkout of untrained models: what it writes, resumes and refuses."""

import csv
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

from stages import evaluate, profile
from stages.data import shards
from stages.files.artifacts import Refusal, read_json
from stages.measure import scoring
from stages.model.hub import build_student, build_teacher, save
from stages.run.entry import Place

VOCAB = shards.BytesTokenizer.vocab_size
LINE = "def double(value):\n    return value + value  # line {}\n"


class SilentRun:
    def __init__(self):
        self.logged = {}

    def metrics(self, values, step=None):
        self.logged |= values

    def text(self, name, text):
        self.logged[name] = text


def with_values(settings, section, **values):
    return settings.model_copy(update={section: getattr(settings, section).model_copy(update=values)})


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
    return with_values(tiny_settings, "evaluate", bootstrap_resamples=50)


@pytest.fixture(scope="module")
def checkout(tmp_path_factory, settings) -> Path:
    root = tmp_path_factory.mktemp("checkout")
    write_data(root / "artifacts/data")
    for index, name in enumerate(evaluate.MODELS):
        sparse = "sparse" in name
        if "teacher" in name:
            shape = settings.teacher.model_copy(update={"dense_width": 64 if sparse else 128})
            model = build_teacher(shape, VOCAB, settings.sequence_tokens, seed=index)
        else:
            shape = settings.student.model_copy(update={"mlp_width": 48 if sparse else 96})
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
    return SimpleNamespace(root=checkout, metrics=read_json(checkout / "artifacts/evaluation.json"), run=run)


def outs_of(root: Path) -> dict[str, bytes]:
    files = [
        root / "metrics/evaluate.json",
        root / "artifacts/evaluation.json",
        root / "plots/quality.csv",
        root / "artifacts/samples.json",
        *(root / "artifacts/scores").iterdir(),
    ]
    return {path.name: path.read_bytes() for path in sorted(files)}


def test_every_model_has_its_figures_inside_their_intervals(evaluated):
    assert set(evaluated.metrics["models"]) == set(evaluate.MODELS)
    for model in evaluated.metrics["models"].values():
        for name in ("bits_per_byte", "top1_accuracy", "calibration_error"):
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
        assert sparse["quality_lost_to_continued"] == pytest.approx(
            bits[f"sparse_{name}"] / bits[f"continued_{name}"] - 1, abs=1e-5
        )
        assert 0 < sparse["flops_cut"] < 1


def test_each_model_is_compared_with_all_its_controls(evaluated):
    bits = {name: model["bits_per_byte"] for name, model in evaluated.metrics["models"].items()}
    found = evaluated.metrics["controls"]
    assert {name: set(controls) for name, controls in found.items()} == {
        name: set(controls) for name, controls in evaluate.CONTROLS.items()
    }
    for name, controls in found.items():
        for control, figures in controls.items():
            assert figures["difference"] == pytest.approx(bits[control] - bits[name], abs=1e-4)
            assert figures["difference_low"] <= figures["difference"] <= figures["difference_high"]


def test_the_scores_of_documents_give_the_metrics(evaluated):
    for name, model in evaluated.metrics["models"].items():
        table = np.load(evaluated.root / f"artifacts/scores/{name}.npy")
        assert scoring.bits_per_byte(table) == pytest.approx(model["bits_per_byte"], rel=1e-5)
        assert len(table) == evaluated.metrics["test"]["documents"] == 6


def test_every_test_document_counts_whatever_the_budget(evaluated, settings, tmp_path):
    evaluate.main(with_values(settings, "evaluate", test_tokens=300), Place(evaluated.root, tmp_path), SilentRun())
    test, whole = read_json(tmp_path / "artifacts/evaluation.json")["test"], evaluated.metrics["test"]
    assert test["documents"] == whole["documents"] == 6
    assert test["tokens"] == 300 and test["bytes"] == 300, "a token is a byte, and no document ends within its share"
    assert test["split_tokens"] == whole["split_tokens"] == whole["tokens"]


def test_the_plot_has_a_row_per_model(evaluated):
    rows = list(csv.DictReader((evaluated.root / "plots/quality.csv").open()))
    assert [row["model"] for row in rows] == list(evaluate.MODELS)
    assert list(rows[0]) == ["model", "flops_per_token", "bits_per_byte", "low", "high", "documents"]
    assert {row["documents"] for row in rows} == {"6"}


def test_nothing_that_dvc_keeps_depends_on_the_clock(evaluated):
    assert "seconds" not in json.dumps(evaluated.metrics)


def test_profile_times_every_shape_every_policy_and_the_router(evaluated, settings, monkeypatch):
    monkeypatch.setattr(profile, "cores", lambda: 1)
    quick = with_values(settings, "profile", repetitions=2, decode_tokens=4)
    profile.main(quick, Place(evaluated.root, evaluated.root), SilentRun())
    measured = read_json(evaluated.root / "measurements/profile.json")
    assert set(measured["latency"]) == set(evaluate.PRODUCTS), "a control costs what the model of its shape does"
    for row in measured["latency"].values():
        assert row["prefill_seconds"] > 0 and row["decode_seconds_per_token"] > 0
        assert row["prefill_peak_bytes"] > row["weight_bytes"] > 0
        for key in ("prefill_seconds", "decode_seconds_per_token"):
            parts = row[f"{key}_by_part"]
            assert set(parts) == {"embedding", "attention", "mlp", "norms", "head", "rest"}
            assert all(seconds > 0 for seconds in parts.values())
    assert measured["checkpointing"].keys() == {row["policy"] for row in evaluated.metrics["checkpointing"]}
    assert measured["checkpointing"]["none"]["step_seconds_ratio"] == 1
    assert measured["router"]["repetitions"] >= 2
    assert all(row["repetitions"] == 2 for row in measured["checkpointing"].values())
    assert measured["router"]["ratio_low"] <= measured["router"]["ratio"] <= measured["router"]["ratio_high"]


def test_the_samples_continue_one_prompt(evaluated):
    texts = read_json(evaluated.root / "artifacts/samples.json")
    assert set(texts) == set(evaluate.PRODUCTS)
    assert all(text.startswith(LINE.format(0)[: evaluate.SAMPLE_PROMPT_TOKENS]) for text in texts.values())


def test_dvcs_metrics_are_the_headline_alone(evaluated):
    """Every number here is a column of `dvc exp show`."""
    headline = read_json(evaluated.root / "metrics/evaluate.json")
    assert 10 < len(headline) < 20 and all(isinstance(value, int | float) for value in headline.values())
    assert headline["test_documents"] == 6
    assert headline["student_bits_per_byte"] == evaluated.metrics["models"]["student"]["bits_per_byte"]


def test_the_run_hears_of_the_headline_figures(evaluated):
    bits = evaluated.metrics["models"]["student"]["bits_per_byte"]
    assert evaluated.run.logged["student_bits_per_byte"] == pytest.approx(bits, rel=1e-5)


def test_a_second_evaluation_gives_the_same_bytes(evaluated, settings, tmp_path):
    evaluate.main(settings, Place(evaluated.root, tmp_path), SilentRun())
    assert outs_of(tmp_path) == outs_of(evaluated.root)


# A checkout evaluated by a process of its own, each batch slowed down so that a signal meets it.
VICTIM = """
import sys, time
from pathlib import Path
from stages import evaluate
from stages.measure import scoring
from stages.run.entry import Place
from stages.settings.compose import compose
from stages.settings.schema import validate

s = validate(compose(["scale=tiny", "corpus=stdlib"]))
quick = s.evaluate.model_copy(update={"bootstrap_resamples": 50, "batch_sequences": 2})
plain, scoring.SAVE_SECONDS = scoring.window_scores, float(sys.argv[3])

def slow(*arguments):
    time.sleep(0.2)
    return plain(*arguments)

class Run:
    metrics = text = lambda *a, **k: None

scoring.window_scores, evaluate.cores = slow, lambda: 1
try:
    evaluate.main(s.model_copy(update={"evaluate": quick}), Place(Path(sys.argv[1]), Path(sys.argv[2])), Run())
except KeyboardInterrupt as interruption:
    sys.exit(f"offramp: {interruption}")
"""


@pytest.fixture
def copy(evaluated, tmp_path) -> Path:
    root = tmp_path / "checkout"
    shutil.copytree(evaluated.root / "artifacts", root / "artifacts", ignore=shutil.ignore_patterns("scores"))
    return root


@pytest.fixture(scope="module")
def by_two(settings):
    return with_values(settings, "evaluate", batch_sequences=2)


def start_victim(root: Path, out: Path, save_seconds: float) -> subprocess.Popen:
    environment = os.environ | {"PYTHONPATH": str(Path(__file__).parent.parent)}
    command = [sys.executable, "-c", VICTIM, str(root), str(out), str(save_seconds)]
    return subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def wait_for(found, child: subprocess.Popen) -> None:
    deadline = time.monotonic() + 60
    while not found():
        assert child.poll() is None and time.monotonic() < deadline, child.communicate()[1]
        time.sleep(0.01)


def windows_scored(root: Path, out: Path, settings) -> int:
    """How many calls of the models this evaluation needs."""
    calls, original = [], scoring.window_scores
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(scoring, "window_scores", lambda *arguments: calls.append(1) or original(*arguments))
        evaluate.main(settings, Place(root, out), SilentRun())
    assert not list((root / ".runs/resume").iterdir()), "a finished evaluation leaves no state behind"
    return len(calls)


@pytest.fixture(scope="module")
def whole(evaluated, by_two, tmp_path_factory):
    """What an uninterrupted evaluation writes, and how often it calls the models."""
    out = tmp_path_factory.mktemp("whole")
    calls = windows_scored(evaluated.root, out, by_two)
    return SimpleNamespace(outs=outs_of(out), calls=calls)


def test_an_evaluation_killed_twice_resumes_and_gives_the_same_bytes(copy, by_two, whole, tmp_path):
    """kill -9 while windows are scored, and again as soon as all is counted."""
    for name in ("sums", "counted"):
        child = start_victim(copy, tmp_path / "killed", save_seconds=0)
        wait_for(lambda name=name: list((copy / ".runs/resume").glob(f"evaluate-*/{name}")), child)
        child.send_signal(signal.SIGKILL)
        said, _ = child.communicate()
    assert "evaluate: continuing after window" in said, "the second one scored only what the first had not"
    assert windows_scored(copy, tmp_path / "resumed", by_two) == 0
    assert outs_of(tmp_path / "resumed") == whole.outs


def test_an_evaluation_told_to_stop_saves_says_so_in_a_line_and_continues(copy, by_two, whole, tmp_path):
    child = start_victim(copy, tmp_path / "stopped", save_seconds=3600)
    wait_for(lambda: list((copy / ".runs/resume").glob("evaluate-*/lock")), child)
    time.sleep(0.3)
    child.send_signal(signal.SIGTERM)
    _, said = child.communicate(timeout=60)
    assert child.returncode == 1 and "Traceback" not in said
    assert "interrupted while scoring, after window" in said and "the same command continues there" in said
    assert windows_scored(copy, tmp_path / "resumed", by_two) < whole.calls
    assert outs_of(tmp_path / "resumed") == whole.outs


def test_a_damaged_count_is_named_and_counted_again(copy, by_two, whole, tmp_path, monkeypatch, capsys):
    with monkeypatch.context() as patch, pytest.raises(ZeroDivisionError):
        patch.setattr(evaluate, "quality_csv", lambda *arguments: 1 / 0)
        evaluate.main(by_two, Place(copy, tmp_path / "failed"), SilentRun())
    (kept,) = (copy / ".runs/resume").glob("evaluate-*/counted")
    content = bytearray(kept.read_bytes())
    content[content.index(b'"bits_per_byte": ') + 19] ^= 1  # another digit: still JSON
    kept.write_bytes(content)
    assert windows_scored(copy, tmp_path / "resumed", by_two) == 0
    assert f"{kept} is damaged" in capsys.readouterr().err
    assert outs_of(tmp_path / "resumed") == whole.outs


def test_progress_of_other_models_or_settings_is_never_used(copy, settings):
    def key_of(settings, **conditions):
        return evaluate.state_key(settings, {"threads": 1} | conditions, Place(copy, copy))

    key = key_of(settings)
    assert key == key_of(settings)
    assert key != key_of(settings, threads=2)
    assert key != key_of(settings.model_copy(update={"seed": settings.seed + 1}))
    assert key != key_of(with_values(settings, "evaluate", test_tokens=100))
    save(build_student(settings.student, VOCAB, settings.sequence_tokens, seed=99), copy / "artifacts/control")
    assert key != key_of(settings)


def test_models_of_another_vocabulary_are_refused(evaluated, settings, tmp_path):
    shutil.copytree(evaluated.root / "artifacts", tmp_path / "artifacts")
    shutil.rmtree(tmp_path / "artifacts/control")
    save(build_student(settings.student, 512, 64, seed=1), tmp_path / "artifacts/control")
    with pytest.raises(Refusal, match="artifacts/control has a vocabulary of 512"):
        evaluate.main(settings, Place(tmp_path, tmp_path), SilentRun())


def test_a_missing_model_is_refused_by_name(evaluated, settings, tmp_path):
    shutil.copytree(evaluated.root / "artifacts/data", tmp_path / "artifacts/data")
    with pytest.raises(Refusal, match="teacher"):
        evaluate.main(settings, Place(tmp_path, tmp_path), SilentRun())
