"""Scores belong to documents, add up to the plain loss, survive interruption, and bear honest intervals."""

import contextlib
import json
import math
import os
import signal

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st

from stages import evaluate
from stages.data import shards
from stages.files.artifacts import Refusal
from stages.files.resuming import Interruption, ResumeState
from stages.measure import scoring
from stages.model.hub import build_student, build_teacher


def fake_table(bits, bytes_per_document=1000, seed=0, spread=0.2):
    """Documents whose difficulty varies; two tables of one seed are as paired as two models on one text."""
    difficulty = np.random.default_rng(seed).normal(1, spread, size=40)
    table = np.zeros((40, len(scoring.COLUMNS)))
    table[:, scoring.NATS] = bits * difficulty * bytes_per_document * math.log(2)
    table[:, scoring.BYTES], table[:, scoring.TOKENS] = bytes_per_document, 300
    return table


def stream_of(lengths, vocab_size=512):
    n = sum(lengths)
    tokens = torch.randint(1, vocab_size, (n + 1,), generator=torch.Generator().manual_seed(3)).numpy()
    return scoring.Stream(
        tokens, np.repeat(np.arange(len(lengths)), lengths), np.array([3 * length for length in lengths])
    )


def score(model, stream, **options):
    tables = scoring.score({"student": model}, stream, 64, 2, reference="student", **options)
    return tables["student"]


@pytest.fixture(scope="module")
def student(tiny_settings):
    return build_student(tiny_settings.student, 512, 64, seed=1).eval()


def test_losses_of_documents_add_up_to_the_plain_loss_over_windows(student):
    stream = stream_of([70, 1, 130, 55])
    table = score(student, stream)
    nats = []
    for start in range(0, 256, 64):
        window = torch.from_numpy(stream.tokens[start : start + 65])
        with torch.no_grad():
            nats.append(F.cross_entropy(student(window[None, :-1])[0], window[1:], reduction="none"))
    nats_N = torch.cat(nats).double().numpy()
    expected = [nats_N[stream.document_of == document].sum() for document in range(4)]
    np.testing.assert_allclose(table[:, scoring.NATS], expected, rtol=1e-5)
    assert table[:, scoring.TOKENS].tolist() == [70, 1, 130, 55]
    plain = nats_N.sum() / math.log(2) / (3 * 256)
    assert scoring.bits_per_byte(table) == pytest.approx(plain, rel=1e-6)


def test_every_token_is_scored_once_whatever_the_last_window_holds(student):
    for lengths in ([64, 64], [65, 64], [10, 3], [64, 63]):
        table = score(student, stream_of(lengths))
        assert table[:, scoring.TOKENS].tolist() == lengths
        assert (table[:, scoring.NATS] > 0).all()


def test_models_are_compared_with_the_reference_and_scored_as_if_alone(student, tiny_settings):
    stream = stream_of([100, 60])
    teacher = build_teacher(tiny_settings.teacher, 512, 64, seed=2).eval()
    models = {"teacher": teacher, "twin": teacher, "student": student}
    tables = scoring.score(models, stream, 64, 2, reference="teacher")
    for name in ("teacher", "twin"):
        assert (tables[name][:, scoring.AGREEMENT] == tables[name][:, scoring.TOKENS]).all()
        assert np.abs(tables[name][:, scoring.KL]).max() < 1e-4
    assert tables["student"][:, scoring.KL].min() > 0
    alone = score(student, stream)
    same = [scoring.NATS, scoring.BYTES, scoring.TOKENS, scoring.CORRECT]
    assert tables["student"][:, same].tobytes() == alone[:, same].tobytes()


class Interrupted(Exception):
    pass


def test_an_interrupted_scoring_continues_and_ends_with_the_same_bytes(student, tmp_path, monkeypatch):
    stream = stream_of([200, 150, 300])
    whole = score(student, stream)
    monkeypatch.setattr(scoring, "SAVE_SECONDS", 0)
    seen = []

    def stop_at(window):
        def on_batch(done, total):
            seen.append(done)
            if done == window:
                raise Interrupted

        return on_batch

    for window in (4, 8):
        with pytest.raises(Interrupted), ResumeState(tmp_path, "evaluate", "key") as state:
            score(student, stream, state=state, on_batch=stop_at(window))
    with ResumeState(tmp_path, "evaluate", "key") as state:
        assert score(student, stream, state=state, on_batch=stop_at(None)).tobytes() == whole.tobytes()
        assert seen == [2, 4, 6, 8, 10, 11], "no batch is scored twice"
        assert score(student, stream, state=state).tobytes() == whole.tobytes()


def test_a_signal_saves_the_sums_of_the_batch_that_it_met(student, tmp_path):
    stream, seen = stream_of([200, 150, 300]), []

    def on_batch(done, total):
        seen.append(done)
        if done == 6:  # noticed after the next batch
            os.kill(os.getpid(), signal.SIGTERM)

    for _ in range(2):
        with contextlib.suppress(KeyboardInterrupt), ResumeState(tmp_path, "evaluate", "key") as state:
            with Interruption("evaluate") as interruption:
                score(student, stream, state=state, interruption=interruption, on_batch=on_batch)
    assert seen == [2, 4, 6, 8, 10, 11], "the period had not passed, the signal saved"


@pytest.mark.parametrize("name", [scoring.SUMS, f"{scoring.CONFIDENCES}-0"])
def test_damaged_progress_is_named_and_done_again(student, tmp_path, capsys, name):
    stream = stream_of([100, 80])
    with ResumeState(tmp_path, "evaluate", "key") as state:
        whole = score(student, stream, state=state)
        content = bytearray((state.folder / name).read_bytes())
        for damaged in (content[:-9], content[:200] + bytes([content[200] ^ 1]) + content[201:], b""):
            (state.folder / name).write_bytes(damaged)
            assert score(student, stream, state=state).tobytes() == whole.tobytes()
            assert f"{state.folder / name} is damaged" in capsys.readouterr().err


def test_progress_whose_confidences_are_gone_is_not_used(student, tmp_path):
    stream, seen = stream_of([100, 80]), []
    with ResumeState(tmp_path, "evaluate", "key") as state:
        whole = score(student, stream, state=state)
        (state.folder / f"{scoring.CONFIDENCES}-0").unlink()
        again = score(student, stream, state=state, on_batch=lambda done, _: seen.append(done))
    assert again.tobytes() == whole.tobytes() and seen == [2, 3]


# ---- calibration


def plain_calibration_error(confidence_N, correct_N):
    """Sorted tokens in 15 bins of equal mass, written as the papers do."""
    order = np.argsort(confidence_N, kind="stable")
    places = [order[np.arange(len(order)) * 15 // len(order) == bin] for bin in range(15)]
    return sum(
        len(place) / len(order) * abs(confidence_N[place].mean() - correct_N[place].mean()) for place in places
    )


def calibrated_table(confidence_N, correct_N, document_of):
    n_documents = document_of.max() + 1
    table = np.zeros((n_documents, len(scoring.COLUMNS)))
    table[:, scoring.TOKENS] = np.bincount(document_of)
    signed_N = np.where(correct_N, confidence_N, -confidence_N)
    table[:, scoring.FIRST_GAP :] = scoring.calibration_gaps(signed_N, document_of, n_documents)
    return table


@pytest.mark.parametrize("exponent", [1.0, 3.0])
def test_the_calibration_error_is_that_of_the_plain_formula_and_its_interval_holds_it(exponent):
    """`exponent` 1: right as often as it says; 3: far too sure of itself."""
    generator = np.random.default_rng(1)
    confidence_N = generator.uniform(0.05, 1, size=6000).astype(np.float32)
    correct_N = generator.uniform(size=6000) < confidence_N**exponent
    table = calibrated_table(confidence_N, correct_N, np.arange(6000) // 150)
    found = scoring.calibration_error(scoring.Bootstrap(40, 500, 1), table)
    expected = plain_calibration_error(confidence_N.astype(float), correct_N)
    assert found.value == pytest.approx(expected, rel=1e-9)
    assert 0 <= found.low < found.value < found.high
    assert found.value < 0.03 if exponent == 1 else found.value > 0.2


def test_a_model_that_is_sure_and_right_has_no_calibration_error_and_one_that_is_sure_and_wrong_has_all():
    document_of = np.repeat([0, 1], 60)
    for correct, error in ((True, 0.0), (False, 1.0)):
        table = calibrated_table(np.ones(120, np.float32), np.full(120, correct), document_of)
        assert scoring.calibration_error(scoring.Bootstrap(2, 20, 1), table).value == error


def test_fewer_tokens_than_bins_and_one_document_are_no_failure():
    table = calibrated_table(np.array([0.5, 0.25], np.float32), np.array([True, False]), np.array([0, 0]))
    found = scoring.calibration_error(scoring.Bootstrap(1, 20, 1), table)
    assert found.value == pytest.approx((0.5 + 0.25) / 2) and found.low is None


def test_the_gaps_of_scored_documents_are_those_of_the_models_first_choices(student):
    stream = stream_of([70, 130])
    table = score(student, stream)
    confidence, correct = [], []
    for start in range(0, 200, 64):
        window = torch.from_numpy(stream.tokens[start : start + 65])
        with torch.no_grad():
            probability, choice = student(window[None, :-1])[0].softmax(-1).max(-1)
        confidence.append(probability.numpy())
        correct.append((choice == window[1:]).numpy())
    expected = calibrated_table(np.concatenate(confidence), np.concatenate(correct), stream.document_of)
    np.testing.assert_allclose(table[:, scoring.FIRST_GAP :], expected[:, scoring.FIRST_GAP :], atol=1e-4)


def test_weights_that_are_not_finite_are_refused(tiny_settings):
    broken = build_student(tiny_settings.student, 512, 64, seed=1).eval()
    with torch.no_grad():
        broken.norm.weight[0] = math.nan
    with pytest.raises(Refusal, match="not finite"):
        score(broken, stream_of([70, 70]))


@given(st.lists(st.integers(1, 400), min_size=1, max_size=30), st.integers(1, 5000))
def test_every_document_counts_with_an_even_share_of_the_tokens(lengths, budget):
    shares = scoring.even_shares(np.array(lengths), budget)
    longest = shares.max()
    assert all(share == min(length, longest) for share, length in zip(shares, lengths, strict=True))
    assert shares.sum() <= max(budget, len(lengths))
    if shares.sum() < sum(lengths) and longest > 1:
        cut = sum(share < length for share, length in zip(shares, lengths, strict=True))
        assert shares.sum() + cut > budget, "a token more of each would not fit"


def test_the_stream_has_the_beginning_of_every_document_and_counts_its_bytes(tmp_path):
    texts, tokenizer = ["ä" * 30, "short", "b" * 50], shards.BytesTokenizer()
    documents = [(tokenizer.encode(text), len(text.encode())) for text in texts]
    part = shards.write_split(tmp_path, "test", documents, tokenizer, 64)
    card = {"vocab_size": 257, "end_of_text": 256, "dtype": "uint16", "splits": {"test": part}}
    shards.write_card(tmp_path, card)
    tokens = shards.Tokens(tmp_path, "test")
    whole = scoring.read_stream(tokens, tokenizer, 1000)
    assert whole.tokens[1:].tolist() == tokens.window(0, len(tokens)).tolist()
    assert whole.document_bytes.tolist() == [60, 5, 50]
    cut = scoring.read_stream(tokens, tokenizer, 30)
    assert bytes(cut.tokens[cut.tokens < 256].tolist()).decode() == "ä" * 6 + "short" + "b" * 12
    assert cut.document_of.tolist() == [0] * 12 + [3] + [1] * 6 + [2] * 12 + [3], "no token of document 3 is scored"
    assert cut.tokens[1:][cut.document_of == 3].tolist() == [256, 256]
    assert cut.document_bytes.tolist() == [12, 5, 12]


def test_the_end_of_text_after_a_cut_document_is_not_scored(student):
    stream = stream_of([50, 60, 40])
    marked = stream._replace(document_of=np.where(np.arange(150) == 49, 3, stream.document_of))
    plain, table = score(student, stream), score(student, marked)
    assert table[:, scoring.TOKENS].tolist() == [49, 60, 40]
    assert table[0, scoring.NATS] < plain[0, scoring.NATS]
    sums = slice(scoring.FIRST_GAP)  # the bins of the gaps hold equally many of all tokens
    assert table[1:, sums].tobytes() == plain[1:, sums].tobytes()


def test_the_bootstrap_depends_on_its_seed_alone():
    table = fake_table(2.0)
    first, again, other = (scoring.Bootstrap(40, 50, seed).bits_per_byte(table) for seed in (1, 1, 2))
    assert first.tobytes() == again.tobytes() != other.tobytes()


def test_the_interval_has_the_width_of_the_standard_error():
    table = fake_table(2.0)
    found = scoring.estimate(
        scoring.bits_per_byte(table), scoring.Bootstrap(40, 4000, 1).bits_per_byte(table)
    )
    per_document = table[:, scoring.NATS] / math.log(2) / 1000
    error = per_document.std(ddof=1) / math.sqrt(40)
    assert found.low < found.value < found.high
    assert (found.high - found.low) / (2 * 1.96 * error) == pytest.approx(1, abs=0.1)


def test_pairing_makes_the_interval_of_a_ratio_far_narrower_than_that_of_its_parts():
    bootstrap = scoring.Bootstrap(40, 500, 1)
    kept = scoring.quality_kept(bootstrap, fake_table(1.8), fake_table(2.0))
    assert kept.value == pytest.approx(0.9)
    alone = scoring.estimate(2.0, bootstrap.bits_per_byte(fake_table(2.0)))
    assert kept.high - kept.low < 1e-9 < alone.high - alone.low


def test_gap_closed_is_the_share_of_the_way_from_control_to_teacher():
    bootstrap = scoring.Bootstrap(40, 500, 1)
    closed, reason = scoring.gap_closed(bootstrap, fake_table(1.8), fake_table(1.85), fake_table(2.0))
    assert closed.value == pytest.approx(0.75)
    assert closed.low <= closed.value + 1e-9 and closed.value <= closed.high + 1e-9
    assert reason == ""


@pytest.mark.parametrize("control_seed", [0, 7])
def test_gap_closed_is_not_stated_inside_the_noise(control_seed):
    bootstrap = scoring.Bootstrap(40, 500, 1)
    control = fake_table(
        1.7 if control_seed == 0 else 1.81, seed=control_seed
    )  # below the teacher; within noise
    closed, reason = scoring.gap_closed(bootstrap, fake_table(1.8), fake_table(1.75), control)
    assert closed.value is None and "two standard errors" in reason


def test_quality_lost_is_relative_to_the_dense_model():
    bootstrap = scoring.Bootstrap(40, 100, 1)
    assert scoring.quality_lost(bootstrap, fake_table(2.0), fake_table(2.1)).value == pytest.approx(0.05)
    assert scoring.quality_lost(bootstrap, fake_table(2.0), fake_table(1.9)).value == pytest.approx(-0.05)


def test_one_document_has_no_interval():
    table = fake_table(2.0)[:1]
    found = scoring.estimate(2.0, scoring.Bootstrap(1, 50, 1).bits_per_byte(table))
    assert found.low is None and found.high is None
    closed, reason = scoring.gap_closed(scoring.Bootstrap(1, 50, 1), table * 0.5, table, table)
    assert closed.value is None and reason == "one test document gives no standard error"
    tables = dict.fromkeys(("teacher", "student", "control"), table)
    tables |= {f"{kind}_{name}": table for kind in ("sparse", "continued") for name in ("teacher", "student")}
    figures = dict.fromkeys(tables, {"parameters": 1, "flops_per_token": 1})
    found = evaluate.comparisons(scoring.Bootstrap(1, 50, 1), tables, figures)
    assert found["teacher_over_control"]["standard_error"] is None
    tables |= dict.fromkeys((name for names in evaluate.CONTROLS.values() for name in names), table)
    found = [found, evaluate.control_differences(scoring.Bootstrap(1, 50, 1), tables)]
    assert "NaN" not in json.dumps(found)
