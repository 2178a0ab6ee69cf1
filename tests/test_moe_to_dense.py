"""The student is born from the teacher: exact where it can be, close where it cannot."""

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F

from stages.compress.warm_start import initialise_student, layer_sources, rope_order, shared_parts
from stages.files.artifacts import Refusal
from stages.model.families.deepseek_v3.model import DeepseekV3Shape as TeacherShape
from stages.model.families.qwen3.model import Qwen3Shape as StudentShape
from stages.model.hub import new_model

TEACHER = TeacherShape(
    vocab_size=40, sequence_tokens=24, layers=3, dense_layers=1, width=32, heads=4, nope_head_dim=8,
    rope_head_dim=8, value_head_dim=16, latent_width=16, dense_width=32, experts=6, experts_per_token=2,
    shared_experts=1, expert_width=16, gating="sigmoid", route_scale=1.5, rope_theta=10000.0,
)
STUDENT = StudentShape(
    vocab_size=40, sequence_tokens=24, layers=3, width=32, heads=4, kv_heads=4, head_dim=16, mlp_width=32,
    rope_theta=10000.0,
)


def batches(count=4, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randint(40, (8, 25), generator=generator) for _ in range(count)]


def a_teacher(**changes):
    teacher = new_model(replace(TEACHER, **changes), seed=1).eval()
    with torch.no_grad():
        for name, parameter in teacher.named_parameters():
            if parameter.dim() == 1:  # uneven norms, so that losing one would show
                parameter.copy_(1 + 0.3 * torch.randn(len(parameter), generator=torch.manual_seed(2)))
            else:
                parameter.mul_(1 if name.startswith("embedding") else 5)
    return teacher


def a_student(**changes):
    return new_model(replace(STUDENT, **changes), seed=7).eval()


def inputs_of(teacher, name):
    seen = []
    hook = teacher.get_submodule(name).register_forward_pre_hook(lambda _, x: seen.append(x[0].flatten(0, 1)))
    with torch.no_grad():
        teacher(batches(1, seed=5)[0][:, :-1])
    hook.remove()
    return seen[0]


def test_a_dense_mlp_of_equal_size_is_reproduced_exactly_with_embedding_and_head():
    teacher, student = a_teacher(dense_layers=3), a_student(mlp_width=40)
    copied = initialise_student(student, teacher, batches())
    x_ND = inputs_of(teacher, "blocks.1.mlp_norm")
    old, new = teacher.blocks[1], student.blocks[1]
    torch.testing.assert_close(new.mlp(new.mlp_norm(x_ND)), old.mlp(old.mlp_norm(x_ND)), rtol=1e-4, atol=1e-6)
    assert torch.equal(student.embedding.weight, teacher.embedding.weight)
    x_ND = inputs_of(teacher, "norm")
    torch.testing.assert_close(student.head(student.norm(x_ND)), teacher.head(teacher.norm(x_ND)))
    assert copied["neurons"] == {"mlp": 96, "shared": 0, "experts": 0} and copied["blocks"] == 3


def test_one_expert_that_every_token_takes_and_the_shared_expert_become_one_exact_mlp():
    teacher, student = a_teacher(experts=1, experts_per_token=1), a_student()
    copied = initialise_student(student, teacher, batches())
    x_ND = inputs_of(teacher, "blocks.2.mlp_norm")
    old, new = teacher.blocks[2], student.blocks[2]
    expected = old.mlp(old.mlp_norm(x_ND).unsqueeze(0))[0][0]
    torch.testing.assert_close(new.mlp(new.mlp_norm(x_ND)), expected, rtol=1e-4, atol=1e-5)
    assert copied["neurons"] == {"mlp": 32, "shared": 32, "experts": 32}


def test_an_expert_nobody_chooses_gives_no_neuron():
    teacher = a_teacher()
    for block in teacher.blocks[1:]:
        block.mlp.bias[0] = -100
    student = a_student(mlp_width=6 * 16)  # room for the shared and five of the six routed experts
    initialise_student(student, teacher, batches())
    assert student.blocks[1].mlp.down.weight.norm(dim=0).min() > 0


def test_a_narrower_student_is_exact_when_the_stream_has_no_more_directions_than_it():
    teacher, student = a_teacher(dense_layers=3), a_student(width=16)
    basis = torch.linalg.qr(torch.randn(32, 16, generator=torch.manual_seed(0))).Q
    with torch.no_grad():
        teacher.embedding.weight.copy_(teacher.embedding.weight @ basis @ basis.T)
        for block in teacher.blocks:
            for linear in (block.attention.output, block.mlp.down):
                linear.weight.copy_(basis @ basis.T @ linear.weight)
    initialise_student(student, teacher, batches())
    tokens = batches(1, seed=5)[0][:, :-1]
    embeddings = teacher.embedding.weight, student.embedding.weight
    stream_DS = torch.linalg.lstsq(*embeddings, driver="gelsd").solution
    old, new = teacher.blocks[0], student.blocks[0]
    x_BTD = teacher.embedding(tokens)
    expected = old.mlp(old.mlp_norm(x_BTD)) @ stream_DS
    found = new.mlp(new.mlp_norm(student.embedding(tokens)))
    assert (found - expected).norm() < 0.01 * expected.norm()


def test_heads_of_their_own_group_lose_nothing_and_shared_ones_keep_the_strongest():
    generator = torch.Generator().manual_seed(0)
    part_HNP = torch.randn(4, 200, 6, generator=generator)
    reader_HOP = torch.randn(4, 9, 6, generator=generator)
    wanted = part_HNP @ reader_HOP.mT
    errors = {}
    for groups, size in ((4, 6), (2, 12), (2, 8), (2, 4)):
        shared_GNd, back_HPd = shared_parts(part_HNP, reader_HOP, groups, size)
        own_HNd = shared_GNd.repeat_interleave(4 // groups, dim=0)
        found = own_HNd @ (reader_HOP @ back_HPd).mT
        errors[groups, size] = ((found - wanted).norm() / wanted.norm()).item()
    assert errors[4, 6] < 1e-4 and errors[2, 12] < 1e-4
    assert 1e-4 < errors[2, 8] < errors[2, 4] < 1


@pytest.mark.parametrize(("free", "rotated"), [(8, 8), (24, 8), (0, 8), (16, 4)])
def test_rotated_dimensions_keep_their_frequency_and_the_strongest_unrotated_ones_turn_slowest(free, rotated):
    order, half = rope_order(free, rotated), (free + rotated) // 2
    assert sorted(order) == list(range(free + rotated))
    for i in range(rotated // 2):
        at = order.index(free + i)
        assert order.index(free + i + rotated // 2) == at + half, "both of a pair"
        assert at / half == i / (rotated // 2), "theta^(-2j/d) equals theta^(-2i/R)"
    if free:
        assert order.index(0) == max(j for j in range(half) if order[j] < free)


def attention_error(student, teacher, layer=0):
    """Relative error of the student's attention output given the teacher's own input."""
    tokens = batches(1, seed=5)[0][:, :-1]
    with torch.no_grad():
        x_BTD = teacher.embedding(tokens)
        seen = []
        for model in (teacher, student):
            hook = model.blocks[layer].attention.register_forward_hook(lambda _, __, y: seen.append(y))
            model.features(tokens)
            hook.remove()
    assert x_BTD.shape == seen[0].shape
    return ((seen[1] - seen[0]).norm() / seen[0].norm()).item()


def test_attention_is_translated_closely_and_grouping_costs_little_more():
    teacher = a_teacher()
    born, grouped, stranger = a_student(), a_student(kv_heads=2), a_student(heads=8)
    for student in (born, grouped, stranger):
        copied = initialise_student(student, teacher, batches())
        expected = 0 if student is stranger else 3
        assert copied["queries_and_keys"] == copied["values_and_outputs"] == expected
    assert attention_error(born, teacher) < 0.4
    assert attention_error(born, teacher) < attention_error(grouped, teacher) < 0.8
    untouched = a_student(heads=8).blocks[0].attention.key.weight
    assert torch.equal(stranger.blocks[0].attention.key.weight, untouched)


def test_the_same_seed_and_text_give_the_same_bits_and_leave_the_teacher_alone():
    teacher = a_teacher()
    before = {name: part.clone() for name, part in teacher.state_dict().items()}
    students = [a_student(width=24, kv_heads=2) for _ in range(2)]
    reports = [initialise_student(student, teacher, batches()) for student in students]
    assert reports[0] == reports[1]
    assert all(torch.equal(a, b) for a, b in zip(*(s.state_dict().values() for s in students), strict=True))
    assert all(torch.isfinite(part).all() for part in students[0].state_dict().values())
    assert all(torch.equal(part, before[name]) for name, part in teacher.state_dict().items())
    assert not any(m._forward_pre_hooks for m in teacher.modules())


def test_layers_are_taken_evenly_from_first_to_last():
    assert layer_sources(3, 3) == [0, 1, 2]
    assert layer_sources(3, 5) == [0, 2, 4]
    assert layer_sources(5, 3) == [0, 1, 2]
    assert layer_sources(1, 4) == [0]


@pytest.mark.parametrize("changes", [{"vocab_size": 41}, {"width": 64}])
def test_a_student_that_cannot_be_born_is_refused_with_the_way_out(changes):
    with pytest.raises(Refusal, match="distill.init to random"):
        initialise_student(a_student(**changes), a_teacher(), batches())


def test_a_student_born_from_a_trained_teacher_starts_far_better_than_a_random_one():
    generator = torch.Generator().manual_seed(0)
    table = torch.randint(40, (40, 2), generator=generator)  # each token has two successors

    def text(sequences):
        rows = [torch.randint(40, (sequences,), generator=generator)]
        for _ in range(24):
            rows.append(table[rows[-1], torch.randint(2, (sequences,), generator=generator)])
        return torch.stack(rows, dim=1)

    def loss(model, tokens):
        return F.cross_entropy(model(tokens[:, :-1]).flatten(0, 1), tokens[:, 1:].flatten())

    teacher = new_model(TEACHER, seed=1)
    optimizer = torch.optim.AdamW(teacher.parameters(), lr=5e-3)
    for _ in range(80):
        optimizer.zero_grad()
        loss(teacher, text(16)).backward()
        optimizer.step()
    held_out, student = text(32), a_student(width=24, heads=3, kv_heads=3)
    with torch.no_grad():
        random = loss(student, held_out).item()
        initialise_student(student, teacher.eval(), [text(32)])
        born, parent = loss(student, held_out).item(), loss(teacher, held_out).item()
    assert random - born > 0.5 * (random - parent), (random, born, parent)
