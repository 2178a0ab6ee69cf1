"""The growth benchmark at sizes of no interest; nothing timed is asserted."""

import xml.etree.ElementTree as ElementTree
from dataclasses import asdict, replace

import pytest
import torch

from benchmarks import growth
from benchmarks.table import of_this_machine
from stages.model.checkpointing import saved_bytes
from stages.training.fit import NextToken
from tests.test_benchmarks import SHAPE

AXES = [growth.Axis(axis.name, axis.fields, (1, 2)) for axis in growth.AXES]
SVG = "{http://www.w3.org/2000/svg}"


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    folder = tmp_path_factory.mktemp("growth")
    rows = growth.rows(SHAPE, AXES, tokens=48, balance_tokens=12, seconds=0, least_rounds=1, folder=folder)
    return list(rows), folder


def test_the_exponent_of_a_power_law_is_found_exactly():
    sizes = [2, 4, 8, 64]
    for power in (-1.0, 0.0, 0.5, 1.0, 2.0):
        assert growth.exponent(sizes, [3 * size**power for size in sizes]) == pytest.approx(power)


def test_each_axis_passes_the_reference_and_changes_its_own_fields_alone():
    reference = asdict(growth.REFERENCE)
    for axis in growth.AXES:
        shapes = axis.shapes(growth.REFERENCE)
        assert list(shapes) == sorted(shapes) and growth.REFERENCE in shapes.values()
        for shape in shapes.values():
            changed = {name for name, value in asdict(shape).items() if value != reference[name]}
            assert changed in (set(), set(axis.fields))
            assert growth.BATCH_TOKENS % shape.sequence_tokens == 0, "every batch has the same number of tokens"


def test_every_axis_gives_a_row_and_every_point_stands_in_the_table_and_in_the_picture(run):
    rows, folder = run
    assert [row.what.rsplit(" ", 4)[0] for row in rows] == [axis.name for axis in AXES]
    for row in rows:
        assert 0 < row.low <= row.high < float("inf") and row.ours > 0 and row.theirs >= 1
    page, picture = (folder / f"{of_this_machine('growth')}.{kind}" for kind in ("md", "svg"))
    lines = page.read_text().splitlines()
    assert f"![growth]({picture.name})" in lines
    panels = ElementTree.parse(picture).getroot().findall(f"{SVG}svg/{SVG}svg")
    assert len(panels) == len(AXES) + 1
    for axis, panel in zip(AXES, panels, strict=False):
        sizes = list(axis.shapes(SHAPE))
        assert all(any(line.startswith(f"| {axis.name} | {size} | ") for line in lines) for size in sizes)
        assert len(panel.findall(f".//{SVG}circle")) == 4 * len(sizes)
    assert len(panels[-1].findall(f".//{SVG}circle")) == 2 * len(growth.EXPERTS.factors)


def test_the_text_has_frequent_words_and_likely_successors():
    ids = growth.text(vocab=100, sequences=40, tokens=100)
    assert ids.shape == (40, 101) and torch.equal(ids, growth.text(100, 40, 100))
    count_V = torch.bincount(ids.flatten(), minlength=100)
    assert count_V[:10].sum() > count_V[-50:].sum()
    before, after = ids[:, :-1].flatten(), ids[:, 1:].flatten()
    likeliest = torch.bincount(after[before == 0], minlength=100).max()
    assert likeliest > 0.45 * (before == 0).sum()


def test_bytes_are_those_that_autograd_keeps_and_the_peak_is_above_the_gradients():
    shape = replace(SHAPE, experts=64)  # its gradients outweigh its activations, and are none of them
    model, tokens_BT1 = growth.new_teacher(shape), growth.batch_of(shape, 12)
    activations, peak = growth.live_bytes(model, tokens_BT1)
    gradients = sum(4 * parameter.numel() for parameter in model.parameters())
    with torch.autocast("cpu", torch.bfloat16, enabled=growth.DTYPE == torch.bfloat16):
        kept = saved_bytes(model, lambda: NextToken(growth.BALANCE_LOSS_WEIGHT)(model, tokens_BT1).loss)
    assert activations == pytest.approx(kept, rel=0.05)
    assert activations < gradients < peak


def test_the_bias_evens_the_load_from_the_first_steps_to_the_last(monkeypatch):
    first, last = growth.violations(SHAPE, tokens=24, steps=30)
    assert 0 < last < first
    monkeypatch.setattr("benchmarks.training_step.BIAS_UPDATE_RATE", 0.0)
    assert growth.violations(SHAPE, tokens=24, steps=30)[1] > last
