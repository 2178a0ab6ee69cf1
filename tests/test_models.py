"""Models on disk: equal to transformers' own classes, byte-identical, and refused when damaged."""

import filecmp
import json
import shutil
import tempfile
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from test_student import SHAPE as STUDENT
from test_teacher import SHAPE as TEACHER

from stages.compress.pruning import prune
from stages.compress.scores import importance
from stages.files.artifacts import Refusal
from stages.measure.flops import counted_flops_per_token, flops_per_token
from stages.model import hub as models

TEACHERS = [
    TEACHER,
    replace(TEACHER, route_scale=2.5, rope_theta=500000.0, shared_experts=2, dense_layers=2),
    replace(
        TEACHER, heads=5, value_head_dim=7, expert_width=11, dense_width=29, experts=5, experts_per_token=3
    ),
]
SCORES = {"heads": "taylor", "neurons": "contribution"}
STUDENTS = [STUDENT, replace(STUDENT, heads=3, kv_heads=1, head_dim=10, mlp_width=19, rope_theta=500000.0)]


def random_model(shape, seed=0):
    """Every weight away from its initial value: norms, biases and large matrices too."""
    model = models.new_model(shape, seed)
    generator = torch.Generator().manual_seed(seed + 1)
    with torch.no_grad():
        for part in model.state_dict().values():
            part.add_(torch.randn(part.shape, generator=generator), alpha=0.1)
    return model.eval()


def largest_difference_from_transformers(model, folder, name):
    # transformers' default kernel refuses widths that are no multiple of 16 bytes; its eager one takes any
    transformers = pytest.importorskip("transformers")
    models.save(model, folder, end_of_text=3)
    theirs, report = getattr(transformers, name).from_pretrained(
        folder,
        output_loading_info=True,
        **({"experts_implementation": "eager"} if "Deepseek" in name else {}),
    )
    assert not any(report.values()), report
    assert theirs.config.eos_token_id == 3
    tokens_BT = torch.randint(0, 40, (3, 17), generator=torch.Generator().manual_seed(2))
    with torch.no_grad():
        ours_BTV, theirs_BTV = model(tokens_BT), theirs.eval()(tokens_BT).logits
    assert ours_BTV.std() > 0.1
    return (ours_BTV - theirs_BTV).abs().max().item()


@pytest.mark.parametrize("shape", TEACHERS)
def test_a_saved_teacher_gives_the_same_logits_in_transformers(shape, tmp_path):
    assert largest_difference_from_transformers(random_model(shape), tmp_path, "DeepseekV3ForCausalLM") < 1e-4


@pytest.mark.parametrize("shape", STUDENTS)
def test_a_saved_student_gives_the_same_logits_in_transformers(shape, tmp_path):
    assert largest_difference_from_transformers(random_model(shape), tmp_path, "Qwen3ForCausalLM") < 1e-4


def test_transformers_refuses_a_softmax_teacher_instead_of_applying_a_sigmoid(tmp_path):
    transformers = pytest.importorskip("transformers")
    models.save(random_model(replace(TEACHER, gating="softmax")), tmp_path)
    assert json.loads((tmp_path / "config.json").read_text())["scoring_func"] == "softmax"
    with pytest.raises((ValueError, KeyError)):
        transformers.AutoModelForCausalLM.from_pretrained(tmp_path)


@pytest.mark.parametrize(
    "shape", [*TEACHERS, replace(TEACHER, gating="softmax", shared_experts=0), *STUDENTS]
)
def test_loading_gives_back_the_same_model(shape, tmp_path):
    model = random_model(shape)
    models.save(model, tmp_path)
    loaded = models.load(tmp_path)
    assert loaded.shape == shape and not loaded.training
    state = loaded.state_dict()
    assert all(torch.equal(part, state[name]) for name, part in model.state_dict().items())
    assert all(parameter.requires_grad for parameter in loaded.parameters())


@pytest.mark.parametrize("shape", [TEACHER, STUDENT])
def test_saving_the_same_model_twice_gives_the_same_bytes(shape, tmp_path):
    models.save(random_model(shape), tmp_path / "a")
    models.save(models.load(tmp_path / "a"), tmp_path / "b")
    for name in ("config.json", "model.safetensors"):
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes()
    assert sorted(path.name for path in (tmp_path / "a").iterdir()) == ["config.json", "model.safetensors"]


def test_a_loaded_model_can_be_trained_on(tmp_path):
    models.save(random_model(TEACHER), tmp_path)
    model = models.load(tmp_path).train()
    model(torch.zeros(1, 4, dtype=torch.long)).sum().backward()
    assert model.head.weight.grad is not None


def test_building_takes_the_shape_from_the_settings_and_ignores_training_knobs():
    section = SimpleNamespace(**vars(TEACHER), bias_update_rate=0.1, balance_loss_weight=0.1)
    model = models.build_teacher(section, vocab_size=50, sequence_tokens=20, seed=1)
    assert model.shape == replace(TEACHER, vocab_size=50, sequence_tokens=20)
    assert models.build_student(SimpleNamespace(**vars(STUDENT)), 40, 32, 1).shape == STUDENT


@pytest.mark.parametrize(
    ("shape", "rule"),
    [
        (replace(TEACHER, experts_per_token=7), r"experts_per_token \(7\) must be at most experts \(6\)"),
        (replace(TEACHER, gating="tanh"), r"gating \('tanh'\) must be sigmoid or softmax"),
        (replace(TEACHER, rope_head_dim=3), r"rope_head_dim \(3\) must be even"),
        (replace(TEACHER, heads=0), r"heads \(0\) is too small"),
        (replace(STUDENT, heads=3), r"heads \(3\) must be a multiple of kv_heads \(2\)"),
    ],
)
def test_an_impossible_shape_is_refused(shape, rule):
    with pytest.raises(Refusal, match=rule):
        models.new_model(shape, 0)


def refusal_of(folder):
    with pytest.raises(Refusal) as caught:
        models.load(folder)
    assert "\n" not in str(caught.value) and str(folder) in str(caught.value)
    return str(caught.value)


@pytest.fixture
def saved(tmp_path):
    models.save(random_model(TEACHER), tmp_path)
    return tmp_path


def test_missing_files_are_refused(saved):
    (saved / "model.safetensors").unlink()
    assert "is missing" in refusal_of(saved)
    (saved / "config.json").unlink()
    assert "is missing" in refusal_of(saved)


@pytest.mark.parametrize("keep", [0, 5, 100, 0.5, 0.999])
def test_a_truncated_weights_file_is_refused(saved, keep):
    weights = saved / "model.safetensors"
    content = weights.read_bytes()
    weights.write_bytes(content[: keep if isinstance(keep, int) else int(keep * len(content))])
    assert "damaged" in refusal_of(saved)


def test_a_single_changed_byte_is_refused(saved):
    weights = saved / "model.safetensors"
    content = bytearray(weights.read_bytes())
    content[-3] ^= 1
    weights.write_bytes(content)
    assert "SHA-256 differs" in refusal_of(saved)


def test_a_changed_setting_in_the_config_is_refused(saved):
    config = saved / "config.json"
    config.write_text(config.read_text().replace('"num_experts_per_tok": ', '"num_experts_per_tok": 1'))
    assert "SHA-256 differs" in refusal_of(saved)


def edit_config(folder, **changes):
    config = json.loads((folder / "config.json").read_text()) | changes
    config.pop("config_sha256", None)
    (folder / "config.json").write_text(json.dumps(config))


def edit_weights(folder, change):
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    edit_config(folder, weights_sha256=None)


@pytest.mark.parametrize(
    ("change", "told"),
    [
        (lambda t: t["model.norm.weight"].fill_(float("nan")), "model.norm.weight holds a non-finite number"),
        (lambda t: t.pop("model.norm.weight"), r"lacks model.norm.weight \(1 missing\)"),
        (lambda t: t.update(extra=torch.ones(1)), r"has extra \(1 unknown\)"),
        (
            lambda t: t.update({"model.norm.weight": torch.ones(3)}),
            r"model.norm.weight is \[3\].*says \[32\]",
        ),
        (lambda t: t.update({"model.norm.weight": torch.ones(32).int()}), "expected floating point"),
    ],
)
def test_wrong_weights_are_refused_by_name(saved, change, told):
    edit_weights(saved, change)
    with pytest.raises(Refusal, match=told):
        models.load(saved)


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"model_type": "bert"}, "model_type 'bert' is not supported, only deepseek_v3"),
        ({"auto_map": {"AutoModel": "x.py"}}, "auto_map is set: it asks for code from its folder"),
        ({"quantization_config": {"bits": 4}}, "quantization_config is set: its weights are quantised"),
        ({"hidden_size": "wide"}, "hidden_size is 'wide', expected int"),
        ({"hidden_size": 48}, "config.json says"),
        ({"q_lora_rank": 8}, "q_lora_rank is 8, only None is supported"),
        ({"tie_word_embeddings": True}, "lm_head.weight and model.embed_tokens.weight differ"),
        ({"tie_word_embeddings": "yes"}, "tie_word_embeddings is 'yes', expected bool"),
        ({"rope_parameters": {"rope_type": "yarn"}}, "rotary positions are not supported"),
        ({"num_experts_per_tok": 99}, "must be at most experts"),
    ],
)
def test_a_config_that_does_not_fit_is_refused(saved, changes, told):
    edit_config(saved, **changes)
    assert told in refusal_of(saved)


VALUES = st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5)
VALUES |= st.lists(st.integers(), max_size=2) | st.sampled_from([10**9, 2**63, 10**30])
FOLDERS = {}


def folder_with(shape, tmp_path_factory):
    """A saved model, made once: hypothesis calls a test many times."""
    if shape not in FOLDERS:
        FOLDERS[shape] = tmp_path_factory.mktemp("whole")
        models.save(random_model(shape), FOLDERS[shape])
    return FOLDERS[shape]


def loads_the_same_weights_or_refuses(damaged, whole):
    try:
        state = models.load(damaged).state_dict()
    except Refusal as refusal:
        assert "\n" not in str(refusal) and str(damaged) in str(refusal)
    else:
        assert all(torch.equal(part, state[name]) for name, part in models.load(whole).state_dict().items())


@settings(max_examples=80, deadline=None)
@given(data=st.data())
@pytest.mark.parametrize("shape", [TEACHER, STUDENT], ids=["teacher", "student"])
def test_any_value_in_the_config_is_refused_or_leaves_the_weights_as_they_were(shape, tmp_path_factory, data):
    whole = folder_with(shape, tmp_path_factory)
    with tempfile.TemporaryDirectory() as damaged:
        shutil.copytree(whole, damaged, dirs_exist_ok=True)
        keys = sorted(json.loads((whole / "config.json").read_text()).keys() | {"rope_scaling"})
        edit_config(Path(damaged), **{data.draw(st.sampled_from(keys)): data.draw(VALUES)})
        loads_the_same_weights_or_refuses(damaged, whole)


@settings(max_examples=80, deadline=None)
@given(data=st.data())
@pytest.mark.parametrize("name", ["config.json", "model.safetensors"])
def test_any_change_of_the_bytes_is_refused_or_leaves_the_weights_as_they_were(name, tmp_path_factory, data):
    whole = folder_with(STUDENT, tmp_path_factory)
    with tempfile.TemporaryDirectory() as damaged:
        shutil.copytree(whole, damaged, dirs_exist_ok=True)
        content = (whole / name).read_bytes()
        start, end = sorted(data.draw(st.tuples(*[st.integers(0, len(content))] * 2)))
        (Path(damaged) / name).write_bytes(content[:start] + data.draw(st.binary(max_size=8)) + content[end:])
        loads_the_same_weights_or_refuses(damaged, whole)


@pytest.mark.parametrize("length", [0, 10**9, 2**63 - 1, 2**64 - 1])
@pytest.mark.parametrize(
    "header",
    [
        b"",
        b'{"a":' * 100_000,
        b'{"a": {"dtype": "F32", "shape": [1099511627776, 1099511627776], "data_offsets": [0, 4]}}',
        b'{"a": {"dtype": "F32", "shape": [1099511627776], "data_offsets": [0, 4398046511104]}}',
    ],
)
def test_a_weights_header_that_claims_the_impossible_is_refused(saved, header, length):
    (saved / "model.safetensors").write_bytes((length or len(header)).to_bytes(8, "little") + header)
    assert "damaged" in refusal_of(saved)


def written_by_transformers(folder, dtype="float32", **changes):
    """A random Qwen3 as transformers saves it: in several files, tied or not, in any type."""
    transformers = pytest.importorskip("transformers")
    config = transformers.Qwen3Config(
        vocab_size=STUDENT.vocab_size, hidden_size=32, num_hidden_layers=2, num_attention_heads=4, head_dim=8,
        num_key_value_heads=2, intermediate_size=24, max_position_embeddings=32, rms_norm_eps=1e-6, **changes,
    )  # fmt: skip
    torch.manual_seed(0)
    model = transformers.Qwen3ForCausalLM(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.1)
    model.to(getattr(torch, dtype)).save_pretrained(folder, max_shard_size="8KB")
    return transformers.Qwen3ForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("tied", [True, False])
def test_a_folder_that_transformers_wrote_in_several_files_gives_its_logits(tmp_path, tied, dtype):
    theirs = written_by_transformers(tmp_path, dtype, tie_word_embeddings=tied, rope_theta=1e6)
    assert len(list(tmp_path.glob("*.safetensors"))) > 1
    tokens_BT = torch.randint(0, STUDENT.vocab_size, (3, 17), generator=torch.Generator().manual_seed(2))
    with torch.no_grad():
        torch.testing.assert_close(models.load(tmp_path)(tokens_BT), theirs(tokens_BT).logits, rtol=1e-4, atol=1e-4)


def test_a_tied_model_stays_tied_through_loading_saving_and_pruning_and_stores_no_head(tmp_path):
    written_by_transformers(tmp_path / "theirs", tie_word_embeddings=True)
    model = models.load(tmp_path / "theirs")
    assert model.head.weight is model.embedding.weight and model.head.weight.requires_grad
    smaller = prune(model, {"neurons": 0.5}, importance(model, [torch.arange(9)[None]], SCORES))
    for name, each in (("ours", model), ("smaller", smaller), ("new", models.new_model(model.shape, 0))):
        assert each.head.weight is each.embedding.weight
        assert largest_difference_from_transformers(each.eval(), tmp_path / name, "Qwen3ForCausalLM") < 1e-4
        assert "lm_head.weight" not in load_file(tmp_path / name / "model.safetensors")


RELATIONS = [
    replace(STUDENT, kind="llama", norm_epsilon=1e-5),
    replace(STUDENT, kind="llama", attention_bias=True, tied=True, head_dim=10),
    replace(STUDENT, kind="mistral", heads=3, kv_heads=1, norm_epsilon=1e-5),
    replace(STUDENT, kind="qwen2", tied=True),
    replace(STUDENT, kind="qwen3", attention_bias=True, norm_epsilon=1e-5),
]
ARCHITECTURES = {kind: f"{kind.capitalize()}ForCausalLM" for kind in ("llama", "mistral", "qwen2", "qwen3")}


@pytest.mark.parametrize("shape", RELATIONS, ids=lambda shape: shape.kind)
def test_the_relations_of_qwen3_are_transformers_own_models_whole_cached_and_pruned(shape, tmp_path):
    model, tokens_BT1 = random_model(shape), torch.randint(0, 40, (2, 13), generator=torch.Generator().manual_seed(0))
    assert largest_difference_from_transformers(model, tmp_path / "whole", ARCHITECTURES[shape.kind]) < 1e-4
    loaded = models.load(tmp_path / "whole")
    assert loaded.shape == shape
    models.save(loaded, tmp_path / "again", end_of_text=3)
    assert filecmp.cmp(*(tmp_path / name / "model.safetensors" for name in ("whole", "again")), shallow=False)
    with torch.no_grad():
        whole_BTV, cache = loaded(tokens_BT1), loaded.new_cache(2, 13)
        parts = [loaded(piece, cache) for piece in tokens_BT1.split([5, 1, 7], dim=1)]
    torch.testing.assert_close(torch.cat(parts, dim=1), whole_BTV)
    assert flops_per_token(shape, 12)["total"] == counted_flops_per_token(loaded, 12)
    keep = {"heads": 1.0 if shape.kv_heads == 1 else 0.5, "neurons": 0.5}
    smaller = prune(loaded, keep, importance(loaded, [tokens_BT1], SCORES))
    assert largest_difference_from_transformers(smaller, tmp_path / "less", ARCHITECTURES[smaller.shape.kind]) < 1e-4
    new = models.new_model(shape, 0)
    assert all(not part.any() for name, part in new.named_parameters() if name.endswith(".bias"))


def test_a_pruned_llama_whose_heads_do_not_divide_its_width_is_a_mistral_for_transformers_has_that_rule(tmp_path):
    model = random_model(replace(STUDENT, kind="llama", heads=4, kv_heads=4))
    smaller = prune(model, {"heads": 0.75}, importance(model, [torch.arange(9)[None]], SCORES))
    assert (smaller.shape.kind, smaller.shape.heads) == ("mistral", 3)
    assert largest_difference_from_transformers(smaller, tmp_path, "MistralForCausalLM") < 1e-4


def test_what_the_relations_leave_unsaid_in_a_config_is_as_transformers_has_it(tmp_path):
    shape = replace(STUDENT, kind="llama", heads=4, kv_heads=4, head_dim=STUDENT.width // 4, rope_theta=10000.0)
    models.save(random_model(shape), tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    for key in ("head_dim", "num_key_value_heads", "rope_theta", "rope_parameters", "attention_bias", "config_sha256"):
        del config[key]
    (tmp_path / "config.json").write_text(json.dumps(config))
    assert models.load(tmp_path).shape == shape
    for changes, told in (
        ({"mlp_bias": True}, "mlp_bias is True, only False is supported"),
        ({"model_type": "mistral", "sliding_window": 8}, "sliding_window is 8, only None is supported"),
        ({"model_type": "qwen2", "layer_types": ["sliding_attention"]}, "layer_types has others than full_attention"),
        ({"partial_rotary_factor": 0.5}, "scaled or partial rotary positions are not supported"),
        ({"heads": 3, "num_attention_heads": 3, "num_key_value_heads": 1}, "heads (3) must divide width (32)"),
    ):
        (tmp_path / "config.json").write_text(json.dumps(config | changes))
        assert told in refusal_of(tmp_path)


def test_a_folder_of_several_files_that_is_not_whole_is_refused(tmp_path):
    written_by_transformers(tmp_path, tie_word_embeddings=True)
    index, first = tmp_path / "model.safetensors.index.json", min(tmp_path.glob("*.safetensors"))
    whole, held = json.loads(index.read_text()), first.read_bytes()
    first.unlink()
    assert f"{first} is missing" in refusal_of(tmp_path)
    first.write_bytes(held[:-3])
    assert "damaged" in refusal_of(tmp_path)
    first.write_bytes(held)
    name = min(whole["weight_map"])
    for weight_map, told in (
        (whole["weight_map"] | {name: "../model.safetensors"}, "no safetensors file of its folder"),
        (whole["weight_map"] | {name: "pytorch_model.bin"}, "no safetensors file of its folder"),
        (whole["weight_map"] | {name: 3}, "has no weight_map"),
        (whole["weight_map"] | {"more": first.name}, f"{first} lacks more"),
        ({}, "has no weight_map"),
    ):
        index.write_text(json.dumps({"weight_map": weight_map}))
        assert told in refusal_of(tmp_path)


def test_sliding_windows_which_our_attention_has_not_are_left_to_transformers(tmp_path):
    theirs = written_by_transformers(tmp_path, use_sliding_window=True, sliding_window=8, max_window_layers=0)
    model, tokens_BT = models.load(tmp_path), torch.arange(20)[None]
    assert type(model.shape) is not type(STUDENT)
    with torch.no_grad():
        assert torch.equal(model(tokens_BT), theirs(tokens_BT).logits)


def test_bfloat16_weights_without_a_recorded_hash_are_loaded_as_float32(saved):
    edit_weights(saved, lambda t: t.update({name: part.bfloat16() for name, part in t.items()}))
    assert all(part.dtype == torch.float32 for part in models.load(saved).state_dict().values())


def test_a_diverged_model_is_not_saved(tmp_path):
    model = random_model(STUDENT)
    with torch.no_grad():
        model.head.weight[0, 0] = float("inf")
    with pytest.raises(Refusal, match="lm_head.weight holds a non-finite number"):
        models.save(model, tmp_path)
    assert not list(tmp_path.iterdir())
