"""Pruning removes the right structures, and what is left computes what it computed before."""

import json
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file

from stages.compress.pruning import most_important, prune, pruned_shape
from stages.compress.scores import SCORES, importance
from stages.files.artifacts import Refusal
from stages.model.families.deepseek_v3.model import DeepseekV3Shape as TeacherShape
from stages.model.families.qwen3.model import Qwen3Shape as StudentShape
from stages.model.hub import load, new_model, save

TEACHER = TeacherShape(
    vocab_size=61, sequence_tokens=16, layers=3, dense_layers=1, width=32, heads=4, nope_head_dim=6,
    rope_head_dim=4, value_head_dim=8, latent_width=12, dense_width=48, experts=8, experts_per_token=3,
    shared_experts=2, expert_width=16, gating="sigmoid", route_scale=1.5, rope_theta=10000.0,
)
STUDENT = StudentShape(
    vocab_size=61, sequence_tokens=16, layers=2, width=32, heads=6, kv_heads=3, head_dim=8, mlp_width=40,
    rope_theta=10000.0,
)
WORDS = {"heads": "taylor", "neurons": "contribution", "experts": "reap"}
SHAPES = pytest.mark.parametrize("shape", [TEACHER, STUDENT], ids=["teacher", "student"])


def shares(shape):
    own = {"heads": 0.67, "neurons": 0.5}
    return own | {"experts": 0.5, "experts_per_token": 0.67} if shape is TEACHER else own


def a_model(shape, seed=3):
    """Weights ten times the usual size, so that every structure visibly matters, and uneven router biases."""
    model = new_model(shape, seed).eval()
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.mul_(10)
        for buffer in model.buffers():
            buffer.normal_(0.0, 0.1, generator=generator)
    return model


def batches(count=2, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randint(61, (4, 17), generator=generator) for _ in range(count)]


def logits(model):
    with torch.no_grad():
        return model(batches(1, seed=9)[0][:, :-1])


def heads_of(scores):
    return [score for name, score in scores.items() if name.endswith("attention.heads")]


def experts_of(scores):
    return [score for name, score in scores.items() if name.endswith("mlp.experts")]


def parameters(model):
    return sum(parameter.numel() for parameter in model.parameters())


@SHAPES
def test_keeping_everything_gives_identical_logits_in_a_model_of_its_own(shape):
    model = a_model(shape)
    kept = prune(model, {}, importance(model, batches(), WORDS))
    assert torch.equal(logits(kept), logits(model))
    assert {p.data_ptr() for p in kept.parameters()}.isdisjoint(p.data_ptr() for p in model.parameters())


@SHAPES
def test_a_pruned_model_is_physically_smaller_trains_and_survives_saving(shape, tmp_path):
    model = a_model(shape)
    before = logits(model)
    smaller = prune(model, shares(shape), importance(model, batches(), WORDS))
    assert type(smaller) is type(model)
    assert smaller.shape == pruned_shape(shape, shares(shape))
    assert parameters(smaller) < 0.75 * parameters(model)
    smaller(batches(1)[0]).square().mean().backward()
    assert all(p.grad is not None and torch.isfinite(p.grad).all() for p in smaller.parameters())
    save(smaller, tmp_path)
    assert torch.equal(logits(load(tmp_path)), logits(smaller))
    assert torch.equal(logits(model), before), "the dense model must be left alone"


COUNTS = {  # in config.json, and the tensor and dimension that it must equal
    "vocab_size": ("model.embed_tokens.weight", 0),
    "hidden_size": ("model.embed_tokens.weight", 1),
    "intermediate_size": ("model.layers.0.mlp.gate_proj.weight", 0),
    "n_routed_experts": ("model.layers.1.mlp.gate.weight", 0),
    "moe_intermediate_size": ("model.layers.1.mlp.experts.0.gate_proj.weight", 0),
}


@settings(max_examples=12, deadline=None)
@given(data=st.data())
@SHAPES
def test_transformers_reloads_any_pruned_model_with_the_counts_and_logits_that_it_has(shape, tmp_path_factory, data):
    transformers = pytest.importorskip("transformers")
    model, folder = a_model(shape), tmp_path_factory.mktemp("pruned")
    kept = {key: data.draw(st.floats(0.01, 1.0), label=key) for key in shares(shape)}
    smaller = prune(model, kept, random_scores(model))
    save(smaller, folder)
    config, tensors = json.loads((folder / "config.json").read_text()), load_file(folder / "model.safetensors")
    for key, (name, dim) in COUNTS.items():
        assert key not in config or config[key] == tensors[name].shape[dim], key
    of_heads = config.get("v_head_dim") or config["head_dim"]
    assert config["num_attention_heads"] * of_heads == tensors["model.layers.0.self_attn.o_proj.weight"].shape[1]
    assert sum(".mlp.experts.0.up_proj" in name for name in tensors) == config["num_hidden_layers"] - config.get(
        "first_k_dense_replace", config["num_hidden_layers"]
    )
    theirs, report = transformers.AutoModelForCausalLM.from_pretrained(
        folder, output_loading_info=True, experts_implementation="eager" if shape is TEACHER else None
    )
    assert not any(report.values()), report
    with torch.no_grad():
        theirs_BTV = theirs.eval()(batches(1, seed=9)[0][:, :-1]).logits
    torch.testing.assert_close(theirs_BTV, logits(smaller), rtol=1e-3, atol=1e-3)


def random_scores(model):
    generator = torch.Generator().manual_seed(0)
    scores = importance(model, batches(1), dict.fromkeys(WORDS, "magnitude"))
    return {name: torch.rand(score.shape, generator=generator) for name, score in scores.items()}


def test_teacher_shapes_shrink_uniformly_and_keep_their_invariants():
    shape = pruned_shape(TEACHER, {"heads": 0.75, "neurons": 0.6, "experts": 0.25})
    assert (shape.heads, shape.experts, shape.experts_per_token) == (3, 2, 2), "k <= experts left"
    assert shape.dense_width == 32, "29 neurons, to a multiple of 8"
    assert shape.expert_width == 10, "small widths are not rounded"
    wide = pruned_shape(replace(TEACHER, dense_width=512), {"neurons": 0.55}, neuron_multiple=64)
    assert wide.dense_width == 256
    assert pruned_shape(wide, {"neurons": 0.45}, 64).dense_width == 115, "below two multiples, as it is"
    hardly_any = dict.fromkeys(("heads", "neurons", "experts", "experts_per_token"), 0.01)
    assert pruned_shape(TEACHER, hardly_any).heads == 1, "never a whole layer"
    student = pruned_shape(STUDENT, {"heads": 0.67, "neurons": 0.5})
    assert (student.kv_heads, student.heads, student.mlp_width) == (2, 4, 24)


@pytest.mark.parametrize("share", [0.0, -0.5, 1.5])
def test_an_impossible_share_is_refused_by_name(share):
    with pytest.raises(Refusal, match="keep_heads"):
        pruned_shape(TEACHER, {"heads": share})


def test_no_calibration_batch_is_refused():
    with pytest.raises(Refusal, match="calibration"):
        importance(a_model(STUDENT), [], WORDS)


@SHAPES
def test_a_head_that_writes_nothing_ranks_last_and_leaves_without_a_trace(shape):
    model, units = a_model(shape), 4 if shape is TEACHER else 3
    with torch.no_grad():
        for block in model.blocks:
            block.attention.output.weight.unflatten(1, (units, -1))[:, 1] = 0
    scores = importance(model, batches(), WORDS)
    assert all(score.argmin() == 1 and score[1] == 0 for score in heads_of(scores))
    smaller = prune(model, {"heads": (units - 1) / units}, scores)
    torch.testing.assert_close(logits(smaller), logits(model))


@SHAPES
def test_neurons_that_write_nothing_leave_without_a_trace(shape):
    model = a_model(shape)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if name.endswith("down.weight") or name.endswith(".down"):
                weight[..., ::2] = 0  # every second neuron of dense MLP, shared and routed experts
    smaller = prune(model, {"neurons": 0.5}, importance(model, batches(), WORDS))
    assert parameters(smaller) < parameters(model)
    torch.testing.assert_close(logits(smaller), logits(model))


def test_a_silent_neuron_ranks_last_even_with_a_large_output_weight():
    model = a_model(STUDENT)
    with torch.no_grad():
        model.blocks[0].mlp.gate_up.weight[5] = 0
        model.blocks[0].mlp.down.weight[:, 5] = 100
    assert importance(model, batches(), WORDS)["blocks.0.mlp.neurons"].argmin() == 5


@pytest.mark.parametrize("gating", ["sigmoid", "softmax"])
def test_an_expert_nobody_chooses_ranks_last_and_leaves_without_a_trace(gating):
    model = a_model(replace(TEACHER, gating=gating))
    with torch.no_grad():
        for block in model.blocks[1:]:
            if gating == "sigmoid":
                block.mlp.bias[2] = -100  # the bias decides, and must be sliced with the rows
            else:
                model.embedding.weight[:, 0] = 50  # a constant channel that the router reads
                block.mlp.router_weight[:, 0] = 0
                block.mlp.router_weight[2, 0] = -50
    scores = importance(model, batches(), WORDS)
    assert all(score.argmin() == 2 and score[2] == 0 for score in experts_of(scores))
    assert len(experts_of(scores)) == 2, "none in the dense block"
    smaller = prune(model, {"experts": 7 / 8}, scores)
    assert smaller.blocks[1].mlp.router_weight.shape[0] == len(smaller.blocks[1].mlp.bias) == 7
    if gating == "sigmoid":
        assert torch.equal(smaller.blocks[1].mlp.bias, model.blocks[1].mlp.bias[[0, 1, 3, 4, 5, 6, 7]])
    torch.testing.assert_close(logits(smaller), logits(model))


def test_expert_importance_equals_a_plain_loop_over_tokens():
    model, seen = a_model(TEACHER), {}
    moe = model.blocks[1].mlp
    hook = moe.register_forward_pre_hook(lambda _, inputs: seen.update(x_ND=inputs[0].flatten(0, 1)))
    tokens = batches(1)
    with torch.no_grad():
        model(tokens[0][:, :-1])
    hook.remove()
    gates, found = moe.gates(seen["x_ND"]), {expert: [] for expert in range(8)}
    for n, x_D in enumerate(seen["x_ND"]):
        for g, expert in zip(gates.weight_NK[n], gates.expert_index_NK[n].tolist(), strict=True):
            gate, up = (moe.gate_up[expert] @ x_D).chunk(2)
            output_D = moe.down[expert] @ (F.silu(gate) * up)
            found[expert].append((g * output_D.norm()).item())
    expected = torch.tensor([sum(v) / max(len(v), 1) for v in found.values()], dtype=torch.float64)
    torch.testing.assert_close(importance(model, tokens, WORDS)["blocks.1.mlp.experts"], expected, rtol=1e-4, atol=1e-6)


@SHAPES
def test_head_importance_equals_gradient_times_activation(shape):
    model, tokens_BT1 = a_model(shape), batches(1)[0][:1]
    units, kept = (4 if shape is TEACHER else 3), {}

    def keep(_, inputs):
        kept["x"] = inputs[0]
        inputs[0].retain_grad()

    hook = model.blocks[1].attention.output.register_forward_pre_hook(keep)
    loss = F.cross_entropy(model(tokens_BT1[:, :-1]).flatten(0, 1), tokens_BT1[:, 1:].flatten())
    loss.backward()
    hook.remove()
    taylor = (kept["x"] * kept["x"].grad).unflatten(-1, (units, -1)).sum(dim=(0, 1, 3)).abs().double()
    found = importance(model, [tokens_BT1], WORDS)["blocks.1.attention.heads"]
    torch.testing.assert_close(found, (taylor / taylor.norm()).detach(), rtol=1e-3, atol=1e-5)


@SHAPES
def test_measuring_twice_gives_the_same_bits_and_changes_nothing(shape):
    model = a_model(shape).train()
    before = {name: part.clone() for name, part in model.state_dict().items()}
    first, second = importance(model, batches(), WORDS), importance(model, batches(), WORDS)
    assert first.keys() == second.keys() and all(torch.equal(score, second[name]) for name, score in first.items())
    assert model.training and all(p.requires_grad and p.grad is None for p in model.parameters())
    assert all(torch.equal(part, before[name]) for name, part in model.state_dict().items())
    assert not any(m._forward_pre_hooks for m in model.modules())


def test_fewer_experts_per_token_keep_the_first_choices_renormalised():
    model = a_model(TEACHER)
    smaller = prune(model, {"experts_per_token": 0.67}, importance(model, batches(), WORDS))
    x_ND = torch.randn(5, 32, generator=torch.Generator().manual_seed(0))
    many, few = model.blocks[1].mlp.gates(x_ND), smaller.blocks[1].mlp.gates(x_ND)
    assert few.expert_index_NK.shape == (5, 2)
    for n in range(5):
        assert set(few.expert_index_NK[n].tolist()) <= set(many.expert_index_NK[n].tolist())
    torch.testing.assert_close(few.weight_NK.sum(dim=1), torch.full((5,), 1.5))


def test_ties_keep_the_first_and_the_old_order():
    assert most_important(torch.tensor([1.0, 3.0, 1.0, 5.0, 1.0]), 3).tolist() == [0, 1, 3]


def test_importance_of_planted_scores_is_what_prune_obeys():
    model = a_model(STUDENT)
    scores = importance(model, batches(), WORDS)
    planted = scores | {f"blocks.{index}.attention.heads": torch.tensor([0.1, 3.0, 2.0]) for index in range(2)}
    smaller = prune(model, {"heads": 0.67}, planted)
    few, many = smaller.blocks[0].attention, model.blocks[0].attention
    assert torch.equal(few.key.weight, many.key.weight[8:])
    assert torch.equal(few.query.weight, many.query.weight[16:]), "two query heads go with their group"
    assert torch.equal(few.output.weight, many.output.weight[:, 16:])


def test_magnitude_is_the_norm_of_all_weights_of_a_unit():
    student, teacher = a_model(STUDENT), a_model(TEACHER)
    found = importance(student, batches(1), dict.fromkeys(WORDS, "magnitude"))
    attention, mlp = student.blocks[0].attention, student.blocks[0].mlp
    rows = [attention.key.weight[8:16], attention.value.weight[8:16], attention.query.weight[16:32]]
    weights = torch.cat([part.flatten() for part in (*rows, attention.output.weight[:, 16:32])])
    assert found["blocks.0.attention.heads"][1].item() == pytest.approx(weights.norm().item(), rel=1e-5)
    weights = torch.cat([mlp.gate_up.weight[3], mlp.gate_up.weight[43], mlp.down.weight[:, 3]])
    assert found["blocks.0.mlp.neurons"][3].item() == pytest.approx(weights.norm().item(), rel=1e-5)
    found = importance(teacher, batches(1), dict.fromkeys(WORDS, "magnitude"))
    moe = teacher.blocks[1].mlp
    weights = torch.cat([part[5].flatten() for part in (moe.gate_up, moe.down, moe.router_weight)])
    assert found["blocks.1.mlp.experts"][5].item() == pytest.approx(weights.norm().item(), rel=1e-5)
    weights = torch.cat([moe.gate_up[5, 2], moe.gate_up[5, 18], moe.down[5, :, 2]])
    assert found["blocks.1.mlp.experts.neurons"][5, 2].item() == pytest.approx(weights.norm().item(), rel=1e-5)


@SHAPES
def test_the_contribution_of_heads_is_the_mean_norm_of_what_each_adds_to_the_stream(shape):
    model, units, seen = a_model(shape), (4 if shape is TEACHER else 3), []
    output, tokens = model.blocks[1].attention.output, batches(1)
    hook = output.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0].flatten(0, 1)))
    with torch.no_grad():
        model(tokens[0][:, :-1])
    hook.remove()
    found = importance(model, tokens, {"heads": "contribution"})["blocks.1.attention.heads"]
    for unit, (x_Nd, weight_Dd) in enumerate(
        zip(seen[0].chunk(units, dim=1), output.weight.detach().chunk(units, dim=1), strict=True)
    ):
        assert found[unit].item() == pytest.approx((x_Nd @ weight_Dd.T).norm(dim=1).mean().item(), rel=1e-4)


@SHAPES
@pytest.mark.parametrize(("kind", "word"), [(kind, word) for kind, words in SCORES.items() for word in words])
def test_a_model_can_be_pruned_by_every_score(shape, kind, word):
    model = a_model(shape)
    scores = importance(model, batches(), WORDS | {kind: word})
    assert all(score.dtype == torch.float64 and (score >= 0).all() for score in scores.values())
    assert torch.isfinite(logits(prune(model, shares(shape), scores))).all()
