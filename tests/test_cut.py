"""A student that is cut out of a dense teacher has what mattered most, meets its budget, and is what it says."""

import re
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from test_student import SHAPE as QWEN3
from test_teacher import SHAPE as MIXTURE

from stages.compress.cut import cut_student, layer_influence, parameters_of, with_layers
from stages.files.artifacts import Refusal
from stages.model.hub import load, new_model, save

SHAPE = replace(QWEN3, layers=4, mlp_width=64, kind="llama", tied=True)
TOKENS_BT1 = torch.randint(40, (2, 17), generator=torch.Generator().manual_seed(0))


def teacher_of(shape=SHAPE, seed=1):
    model = new_model(shape, seed).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(3)  # so that layers do something
    return model


def test_nothing_leaves_where_everything_is_asked_for():
    teacher = teacher_of()
    student, kept = cut_student(teacher, 1.0, 1.0, 1.0, [TOKENS_BT1])
    assert kept == {"layers": [0, 1, 2, 3], "heads": 2, "neurons": 64, "parameters_share": 1.0}
    assert student.shape == teacher.shape and student.head.weight is student.embedding.weight
    assert torch.equal(student(TOKENS_BT1), teacher(TOKENS_BT1))
    with torch.no_grad():
        student.embedding.weight.zero_()
    assert teacher.embedding.weight.any(), "they share no memory"


def test_the_layers_that_change_nothing_and_the_neurons_that_write_nothing_leave_first():
    teacher = teacher_of()
    with torch.no_grad():
        for block in (teacher.blocks[1], teacher.blocks[2]):
            block.attention.output.weight.zero_()
            block.mlp.down.weight.zero_()
        for block in teacher.blocks:
            block.mlp.down.weight[:, ::2] = 0
    influence_L = layer_influence(teacher, [TOKENS_BT1])
    assert influence_L[1:3].abs().max() < 1e-12 < influence_L[[0, 3]].min()
    wanted = parameters_of(replace(SHAPE, layers=2, mlp_width=32)) / parameters_of(SHAPE)
    student, kept = cut_student(teacher, wanted, 0.5, 1.0, [TOKENS_BT1])
    assert kept["layers"] == [0, 3] and kept["neurons"] == 32 and kept["parameters_share"] == pytest.approx(wanted)
    with torch.no_grad():
        torch.testing.assert_close(student(TOKENS_BT1), teacher(TOKENS_BT1))


@settings(max_examples=15)
@given(
    share=st.floats(0.3, 1), keep_layers=st.floats(0.1, 1), keep_heads=st.floats(0.1, 1),
    kind=st.sampled_from(["llama", "qwen2", "qwen3"]), tied=st.booleans(),
)  # fmt: skip
def test_any_budget_is_met_to_eight_neurons_or_refused(tmp_path_factory, share, keep_layers, keep_heads, kind, tied):
    shape = replace(SHAPE, kind=kind, tied=tied)
    teacher, total = teacher_of(shape), parameters_of(shape)
    try:
        student, kept = cut_student(teacher, share, keep_layers, keep_heads, [TOKENS_BT1])
    except Refusal as refusal:
        assert "student.parameters_share" in str(refusal) and "\n" not in str(refusal)
        return
    counted = sum(parameter.numel() for parameter in student.parameters())
    assert counted == parameters_of(student.shape) <= share * total
    assert kept["parameters_share"] == counted / total and kept["neurons"] == student.shape.mlp_width
    more = replace(student.shape, mlp_width=kept["neurons"] + 8)
    assert kept["neurons"] == shape.mlp_width or parameters_of(more) > share * total - 1
    folder = tmp_path_factory.mktemp("student")
    save(student, folder)
    again = load(folder)
    assert again.shape == student.shape and torch.equal(again(TOKENS_BT1), student.eval()(TOKENS_BT1))


def test_a_budget_that_embedding_and_attention_exceed_is_refused_with_what_they_need():
    line = r"^student.parameters_share: 3,\d+ parameters are too few: .* has 16,928: set it to (\S+) or more"
    with pytest.raises(Refusal, match=line) as refusal:
        cut_student(teacher_of(), 0.1, 1.0, 1.0, [TOKENS_BT1])
    enough = float(re.search(line, str(refusal.value))[1])
    assert cut_student(teacher_of(), enough, 1.0, 1.0, [TOKENS_BT1])[1]["neurons"] == 8


def test_a_mixture_is_not_cut():
    with pytest.raises(Refusal, match=r"out of a deepseek_v3 teacher, only out of a dense one \(qwen3, qwen2, llama"):
        cut_student(new_model(MIXTURE, 0), 0.5, 1.0, 1.0, [TOKENS_BT1])


def test_a_model_with_some_of_the_layers_is_one_whose_other_blocks_are_skipped():
    teacher = teacher_of()
    shorter = with_layers(teacher, [0, 2])
    assert shorter.shape.layers == 2 and not shorter.training
    del teacher.blocks[3], teacher.blocks[1]
    assert torch.equal(shorter(TOKENS_BT1), teacher(TOKENS_BT1))
