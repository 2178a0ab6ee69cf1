"""The comparison of soft targets with the data alone, at a size of no interest. Nothing here is timed."""

from dataclasses import replace

import pytest
import torch
from test_evaluate import VOCAB, write_data
from test_student import SHAPE as QWEN3

from benchmarks.soft_targets import Beginning, Bench, Cell, Pair, Remembering, Result, page, pairs, pairs_table, rated
from stages.data.shards import Tokens, Windows
from stages.measure import scoring
from stages.model.hub import new_model

RATES = (0.01, 0.001)


@pytest.fixture(scope="module")
def bench(tiny_settings, tmp_path_factory) -> Bench:
    folder = tmp_path_factory.mktemp("soft")
    student = tiny_settings.student.model_copy(update={"parameters_share": 0.8})
    plain = tiny_settings.model_copy(update={"sequence_tokens": 16, "student": student})
    write_data(folder / "data")
    teacher = new_model(replace(QWEN3, vocab_size=VOCAB, mlp_width=96), seed=0)
    return Bench(plain, teacher, {"python": folder / "data"}, folder)


@pytest.fixture(scope="module")
def measured(bench) -> Cell:
    """A pair that has been measured, and the teacher."""
    cell = Cell(RATES, steps=3, documents=2)
    for one in ("python", cell, cell.data_alone()):
        bench.measure(one)
    return cell


def weights(model) -> torch.Tensor:
    return torch.cat([parameter.detach().flatten() for parameter in model.parameters()])


def test_soft_targets_of_no_weight_are_the_data_alone_and_else_another_student(bench):
    cell = Cell(RATES, steps=3)
    alone, none, soft = (weights(bench.trained(one)) for one in (cell.data_alone(), replace(cell, soft_weight=0), cell))
    assert torch.allclose(alone, none, atol=1e-6)
    assert not torch.allclose(alone, soft, atol=1e-4)


def test_the_teacher_reads_a_sequence_once_and_a_batch_of_old_and_new_is_in_order(bench):
    teacher = Remembering(bench.teacher.teacher)
    tokens_BT = Windows(Tokens(bench.folders["python"], "train"), 16, seed=1).batch(0, batch_sequences=3)
    read = []
    hook = teacher.teacher.embedding.register_forward_hook(lambda _, inputs, __: read.append(len(inputs[0])))
    teacher.features(tokens_BT[1:2])
    found = teacher.features(tokens_BT).x_BTD
    hook.remove()
    assert read == [1, 2]
    assert torch.allclose(found, teacher.teacher.features(tokens_BT).x_BTD, atol=1e-5)


def test_a_few_documents_are_the_first_of_the_split(bench):
    tokens = Tokens(bench.folders["python"], "train")
    few = Beginning(tokens, 2)
    assert (
        len(few) == tokens.documents[2, 0] and few.window(0, len(few)).tolist() == tokens.window(0, len(few)).tolist()
    )


def test_the_gain_is_the_paired_difference_of_the_test_documents(bench, measured):
    alone, soft = bench.found(measured.data_alone()), bench.found(measured)
    assert isinstance(alone, Result) and isinstance(soft, Result)
    gain = scoring.bits_per_byte(alone.scores) - scoring.bits_per_byte(soft.scores)
    other = replace(measured, seed=2)
    named = {"few": Pair(measured, measured.data_alone()), "not measured": Pair(other, other.data_alone())}
    table = pairs_table(bench, named)
    (row,) = [line for line in table.splitlines() if line.startswith("| few ")]
    assert f"{gain:+.4f} (".replace("-", "−") in row and "not measured" not in table


def test_what_was_measured_is_not_measured_again(bench, measured, monkeypatch):
    monkeypatch.setattr(bench, "trained", lambda cell: pytest.fail("measured twice"))
    bench.measure(measured)


def test_the_page_names_the_rates_and_no_two_rows_are_of_one_pair(bench, measured):
    here = {"few": Pair(measured, measured.data_alone())}
    assert "Rates 0.01 and 0.001 " in page(bench, here) and "Not measured" not in page(bench, here)
    other = replace(measured, seed=2)
    told = page(bench, here | {"other": Pair(other, other.data_alone())})
    assert "Not measured yet: other. The same command continues." in told and "| other |" not in told
    named = pairs(RATES)
    assert len(set(named.values())) == len(named) and all(pair.soft.rates == RATES for pair in named.values())
    assert not any(pair.alone.divergence for pair in named.values()) and len(set(rated())) == len(rated())
