"""Families that transformers computes, each on a small checkpoint that transformers itself wrote.

The table of families in docs/own_models.md is made by `row_of`, which tries what it states.
"""

import json
import shutil
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from test_teacher import SHAPE as TEACHER

from stages.compress.pruning import prune, pruned_shape
from stages.compress.scores import importance
from stages.compress.warm_start import initialise_student
from stages.files.artifacts import ROOT, Refusal
from stages.measure.flops import active_parameters, counted_flops_per_token, flops_per_token, total_parameters
from stages.model import checkpointing
from stages.model.divergences import forward_kl
from stages.model.families.adapter import family as adapter_family
from stages.model.families.adapter import reading
from stages.model.families.adapter.family import AdapterFamily
from stages.model.families.adapter.model import AdapterModel, LogitMap, moe_of
from stages.model.families.qwen3.model import Qwen3Shape
from stages.model.generation import generate
from stages.model.hub import load, new_model, save
from stages.model.layers import rope_table
from stages.model.losses import DistillationLoss, next_token
from stages.model.vocabulary import restored, with_rows
from stages.settings.model_types import KNOWN
from stages.sparsify import mean_count
from stages.training.fit import Distillation, NextToken, validation_nats

BASE = {
    "vocab_size": 64, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 64, "bos_token_id": None, "eos_token_id": None,
    "pad_token_id": None, "tie_word_embeddings": False,
}  # fmt: skip
MOE = {"num_experts_per_tok": 2, "moe_intermediate_size": 16}
LATENT = MOE | {
    "n_routed_experts": 8, "n_shared_experts": 1, "first_k_dense_replace": 1, "kv_lora_rank": 16, "v_head_dim": 8,
    "qk_nope_head_dim": 8, "qk_rope_head_dim": 8, "num_key_value_heads": 4,
}  # fmt: skip
YARN = {
    "rope_type": "yarn", "rope_theta": 10000.0, "factor": 4.0, "original_max_position_embeddings": 16, "mscale": 1.0,
    "mscale_all_dim": 1.0, "beta_fast": 32, "beta_slow": 1,
}  # fmt: skip
GRANITE = {"logits_scaling": 2.0, "residual_multiplier": 0.5, "embedding_multiplier": 3.0, "attention_multiplier": 0.3}
WINDOW = {"head_dim": 8, "sliding_window": 8}
CONFIGS = {
    "deepseek_v2": LATENT | {"q_lora_rank": None, "topk_method": "greedy", "n_group": 1, "topk_group": 1},
    "deepseek_v2 q_lora, groups": LATENT
    | {"q_lora_rank": 24, "topk_method": "group_limited_greedy", "n_group": 4, "topk_group": 2},
    "deepseek_v3 q_lora": LATENT | {"q_lora_rank": 24, "n_group": 1, "topk_group": 1, "rope_theta": 10000.0},
    "deepseek_v3 q_lora, groups, yarn": LATENT
    | {"q_lora_rank": 24, "n_group": 4, "topk_group": 2, "rope_parameters": YARN},
    "qwen2_moe": MOE | {"num_experts": 4, "shared_expert_intermediate_size": 24},
    "qwen3_moe": MOE | {"num_experts": 4, "head_dim": 8},
    "mixtral": {"num_local_experts": 4, "num_experts_per_tok": 2},
    "olmoe": {"num_experts": 4, "num_experts_per_tok": 2},
    "glm4_moe": MOE
    | {"n_routed_experts": 4, "n_shared_experts": 1, "first_k_dense_replace": 1, "head_dim": 8, "use_qk_norm": True},
    "granitemoe": GRANITE | {"num_local_experts": 4, "num_experts_per_tok": 2},
    "gpt_oss": WINDOW | {"num_local_experts": 4, "num_experts_per_tok": 2},
    "gemma2": WINDOW | {"tie_word_embeddings": True, "query_pre_attn_scalar": 8, "final_logit_softcapping": 3.0},
    "gemma3_text": WINDOW | {"tie_word_embeddings": True, "query_pre_attn_scalar": 8},
    "olmo2": {},
    "smollm3": {"tie_word_embeddings": True, "no_rope_layers": [1, 0]},
    "granite": GRANITE,
    "llama": {},
    "mistral": {"sliding_window": None},
    "qwen2": {"tie_word_embeddings": True},
    "qwen3": {"head_dim": 8, "rms_norm_eps": 1e-5},
}
MIXTURES = [name for name in CONFIGS if "num_experts_per_tok" in CONFIGS[name] and not name.startswith("gpt")]
# whose kernels compute the whole square of attention, and mask half of it
SQUARE = ("deepseek", "gpt_oss", "gemma")
NO_WARM_START = ("gpt_oss", "gemma2", "gemma3_text", "olmo2")
TOKENS_BT1 = torch.randint(64, (4, 25), generator=torch.Generator().manual_seed(0))
STUDENT = Qwen3Shape(
    vocab_size=64, sequence_tokens=64, layers=2, width=32, heads=4, kv_heads=2, head_dim=8, mlp_width=48,
    rope_theta=10000.0,
)  # fmt: skip
BATCHES = [torch.randint(64, (8, 33), generator=torch.Generator().manual_seed(seed)) for seed in range(4)]
WORDS = {"heads": "taylor", "neurons": "contribution", "experts": "reap"}


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory):
    """A folder that transformers wrote, and its own model, by the name of the configuration; made once."""
    transformers = pytest.importorskip("transformers")
    transformers.logging.disable_progress_bar()
    made = {}

    def make(name):
        if name not in made:
            config = BASE | CONFIGS[name] | {"model_type": name.split()[0]}
            torch.manual_seed(0)
            model = transformers.AutoModelForCausalLM.from_config(transformers.AutoConfig.for_model(**config)).eval()
            with torch.no_grad():
                for _, part in model.named_parameters():  # biases, norms and routers away from 0 and 1 too
                    part.add_(torch.randn(part.shape), alpha=0.15)
            made[name] = tmp_path_factory.mktemp("checkpoint"), model
            model.save_pretrained(made[name][0])
        return made[name]

    return make


@pytest.fixture(scope="session")
def taken(checkpoint):
    """The same through the adapter, whichever own class may know its type too; not to be changed."""
    made = {}

    def take(name):
        if name not in made:
            made[name] = through_adapter(checkpoint(name)[0])
        return made[name]

    return take


def through_adapter(folder):
    family, config = AdapterFamily(), json.loads((folder / "config.json").read_text())
    shape = family.shape_from(config, folder / "config.json")
    return family.read(folder, shape, config.get("weights_sha256")).eval()


def copy_of(folder, tmp_path):
    return Path(shutil.copytree(folder, tmp_path / "copy"))


@torch.no_grad()
def logits(model, tokens_BT=TOKENS_BT1[:, :-1]):
    found = model(tokens_BT)
    return getattr(found, "logits", found)


@pytest.mark.parametrize("name", CONFIGS)
def test_rows_of_the_vocabulary_leave_and_come_back(name, taken, tmp_path):
    transformers, whole, kept = pytest.importorskip("transformers"), taken(name), torch.arange(3, 60, 2)
    some, tokens_BT = with_rows(whole, kept.tolist()), TOKENS_BT1[:, :-1] % len(kept)
    torch.testing.assert_close(logits(some, tokens_BT), logits(whole, kept[tokens_BT])[..., kept])
    assert torch.equal(logits(restored(some, whole, kept.tolist())), logits(whole))
    save(some, tmp_path, end_of_text=5)
    config = json.loads((tmp_path / "config.json").read_text())
    assert (config["vocab_size"], config["eos_token_id"], config["bos_token_id"]) == (len(kept), 5, None)
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path).eval()
    assert torch.equal(logits(theirs, tokens_BT), logits(load(tmp_path), tokens_BT))



@pytest.mark.parametrize("name", CONFIGS)
def test_logits_are_those_of_transformers_to_the_last_bit(checkpoint, taken, name):
    theirs, ours = logits(checkpoint(name)[1]), logits(taken(name))
    assert theirs.std() > 0.1
    assert torch.equal(ours, theirs)


def operations(name, model, T=24):
    """What ran, per token, and the formula, which counts the keys that a token may see; with those, where a kernel
    computes them and masks them, that it may not see.
    """
    by_formula = flops_per_token(model.shape, T)["total"]
    if name.startswith(SQUARE):
        config = model.hub.config
        keys = sum(adapter_family._keys(config, layer, T) for layer in range(model.shape.layers))
        by_formula += adapter_family._scores_per_key(config) * (model.shape.layers * T - keys)
    return counted_flops_per_token(model, T), by_formula


@pytest.mark.parametrize("name", CONFIGS)
def test_operations_by_formula_are_those_that_run(taken, name):
    counted, by_formula = operations(name, taken(name))
    assert counted == pytest.approx(by_formula, rel=1e-9)


@pytest.mark.parametrize("name", CONFIGS)
def test_with_its_cache_a_model_writes_what_it_writes_without(taken, name):
    model = taken(name)
    prompt = TOKENS_BT1[0, :12].tolist()
    assert generate(model, prompt, 6, cache=True) == generate(model, prompt, 6, cache=False)


def test_a_cache_forgets_the_last_tokens(taken):
    model = taken("gemma2")  # also those behind a sliding window
    cache = model.new_cache(1, 20)
    with torch.no_grad():
        model(TOKENS_BT1[:1, :12], cache)
        first = model(TOKENS_BT1[:1, 12:13], cache)
        for layer in cache:
            layer.length -= 1
        assert cache[0].length == 12
        torch.testing.assert_close(model(TOKENS_BT1[:1, 12:13], cache), first)


@pytest.mark.parametrize("name", CONFIGS)
def test_what_we_save_is_what_transformers_saves_and_both_read_it_again(checkpoint, taken, name, tmp_path):
    transformers = pytest.importorskip("transformers")
    folder, _ = checkpoint(name)
    save(taken(name), tmp_path, end_of_text=3, tokenizer_sha256="a")
    ours, theirs = load_file(tmp_path / "model.safetensors"), load_file(folder / "model.safetensors")
    assert ours.keys() == theirs.keys() and all(torch.equal(ours[key], part) for key, part in theirs.items())
    again = load(tmp_path)
    assert type(again) is AdapterModel and again.shape == taken(name).shape
    assert torch.equal(logits(again), logits(taken(name)))
    read, found = transformers.AutoModelForCausalLM.from_pretrained(tmp_path, output_loading_info=True)
    assert not any(found.values()) and read.config.eos_token_id == 3
    assert torch.equal(logits(read.eval()), logits(again))


# ---- reading: what a folder may be


def test_a_config_that_an_own_class_computes_is_read_by_it_and_any_other_by_the_adapter(checkpoint, taken, tmp_path):
    folder = copy_of(checkpoint("deepseek_v3 q_lora")[0], tmp_path)
    assert type(load(folder)) is AdapterModel
    config = json.loads((folder / "config.json").read_text())
    config |= {"q_lora_rank": None, "rms_norm_eps": 1e-6, "num_nextn_predict_layers": 0}
    (folder / "config.json").write_text(json.dumps(config))
    tensors = load_file(folder / "model.safetensors")
    for layer in range(2):
        at = f"model.layers.{layer}.self_attn"
        for name in ("q_a_proj", "q_a_layernorm"):
            tensors.pop(f"{at}.{name}.weight")
        tensors[f"{at}.q_proj.weight"] = torch.randn(64, 32)
        tensors.pop(f"{at}.q_b_proj.weight")
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    assert type(load(folder)).__name__ == "DeepseekV3"


def test_a_model_in_several_files_is_read(checkpoint, taken, tmp_path):
    checkpoint("mixtral")[1].save_pretrained(tmp_path, max_shard_size="20KB")
    assert not (tmp_path / "model.safetensors").exists()
    assert torch.equal(logits(through_adapter(tmp_path)), logits(taken("mixtral")))
    shard = next(tmp_path.glob("*-of-*"))
    shard.unlink()
    refused(tmp_path, rf"{shard.name} is missing, which model.safetensors.index.json names: copy it again")


@pytest.mark.parametrize("name", CONFIGS)
def test_each_tensor_of_a_file_has_a_place_in_the_models_own_memory(taken, name):
    """So that loading takes the model and no copy of it."""
    hub = taken(name).hub
    own = {part.untyped_storage().data_ptr() for part in [*hub.parameters(), *hub.buffers()]}
    places = reading.homes(hub)
    assert all(part.untyped_storage().data_ptr() in own for part in places.values())
    numbers = sum(part.numel() for part in hub.state_dict().values())
    tied = hub.lm_head.weight.numel() if hub.config.tie_word_embeddings else 0
    assert sum(part.numel() for part in places.values()) == numbers - tied


def refused(folder, told):
    with pytest.raises(Refusal, match=told) as found:
        load(folder)
    assert "\n" not in str(found.value) and str(folder) in str(found.value)


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ({"model_type": "bloom"}, "model_type 'bloom' is not supported, only .*deepseek_v2, .*mixtral, .*gpt_oss"),
        ({"auto_map": {"AutoModel": "x.Y"}}, "auto_map is set: it asks for code from its folder, and none is executed"),
        ({"quantization_config": {"quant_method": "fp8"}}, "its weights are quantised: save the folder dequantised"),
        ({"num_hidden_layers": 3}, r"lacks model.layers.2.\S+ \(\d+ missing\): weights and config.json do not match"),
        (
            {"num_hidden_layers": 1},
            r"has model.layers.1.\S+ \(\d+ unknown\), which a Mixtral of this config.json has not",
        ),
        ({"num_hidden_layers": 10**9}, "num_hidden_layers .1000000000. is more than the weights"),
        ({"num_local_experts": 10**9}, "num_local_experts .1000000000. is more than the weights"),
        ({"vocab_size": 65}, r"lm_head.weight is \[64, 32\], config.json says \[65, 32\]: restore the two"),
        ({"vocab_size": "many"}, "vocab_size is 'many', expected a number from 1 on"),
        ({"hidden_act": "none of these"}, "transformers cannot build this model"),
        ({"num_attention_heads": "four"}, "transformers does not take this config|transformers cannot build"),
    ],
)
def test_a_config_that_does_not_fit_is_refused_in_one_line(checkpoint, tmp_path, change, told):
    folder = copy_of(checkpoint("mixtral")[0], tmp_path)
    config = json.loads((folder / "config.json").read_text()) | change
    (folder / "config.json").write_text(json.dumps(config))
    refused(folder, told)


NORM = "model.layers.1.input_layernorm.weight"


@pytest.mark.parametrize(
    ("change", "told"),
    [
        (lambda t: t.pop("model.layers.0.block_sparse_moe.experts.1.w2.weight"), "lacks .*experts.1.w2.weight"),
        (lambda t: t.update(more=torch.ones(2)), r"has more \(1 unknown\)"),
        (lambda t: t.update({NORM: torch.ones(31)}), rf"{NORM} is \[31\], config.json says \[32\]"),
        (lambda t: t.update({NORM: torch.ones(32, dtype=torch.int8)}), f"{NORM} is I8, only floating-point"),
        (lambda t: t.update({NORM: torch.full((32,), torch.nan)}), "input_layernorm.weight holds a non-finite number"),
    ],
)
def test_weights_that_do_not_fit_are_refused_by_name(checkpoint, tmp_path, change, told):
    folder = copy_of(checkpoint("mixtral")[0], tmp_path)
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    refused(folder, told)


def test_a_folder_of_pickles_without_weights_or_cut_short_is_refused(checkpoint, tmp_path):
    folder = copy_of(checkpoint("mixtral")[0], tmp_path)
    weights = folder / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-10])
    refused(folder, "model.safetensors is damaged .* delete it")
    weights.rename(folder / "pytorch_model.bin")
    refused(folder, "pytorch_model.bin may be a pickle, which is never read: save it as safetensors")
    (folder / "pytorch_model.bin").unlink()
    refused(folder, "model.safetensors is missing")


def test_a_saved_folder_whose_weights_changed_is_refused(taken, tmp_path):
    save(taken("olmoe"), tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    tensors["model.norm.weight"] += 1
    save_file(tensors, tmp_path / "model.safetensors", {"format": "pt"})
    refused(tmp_path, "is not the file that was saved")


def test_without_transformers_one_line_says_how_to_get_it(checkpoint, tmp_path, monkeypatch):
    folder, _ = checkpoint("mixtral")
    monkeypatch.setitem(sys.modules, "transformers", None)
    refused(folder, r"model_type 'mixtral': .* not installed: \S+pip install -c constraints.txt -e '.\[huggingface\]'")


# ---- a student of it


def student_of(teacher, **changes):
    shape = replace(STUDENT, rope_theta=teacher.shape.rope_theta or STUDENT.rope_theta, **changes)
    return new_model(replace(shape, head_dim=16) if "kv_lora_rank" in teacher.shape.config_json else shape, seed=1)


def what_parts_read_and_give(teacher, part):
    """Of each block: the input of the part's norm and the output of the part, on text that no one was fitted to."""
    seen = [[None, None] for _ in teacher.blocks]
    hooks = []
    for block, pair in zip(teacher.blocks, seen, strict=True):

        def read(_, inputs, pair=pair):
            pair[0] = inputs[0]

        def give(_, __, out, pair=pair):
            pair[1] = (out[0] if isinstance(out, tuple) else out).view_as(pair[0])

        hooks += [getattr(block, f"{part}_norm").register_forward_pre_hook(read)]
        hooks += [getattr(block, part).register_forward_hook(give)]
    logits(teacher)
    for hook in hooks:
        hook.remove()
    return seen


def relative_error(found, wanted):
    return ((found - wanted).norm() / wanted.norm()).item()


@pytest.mark.parametrize("name", MIXTURES)
def test_experts_whose_gates_are_the_same_for_every_token_become_one_exact_mlp(checkpoint, name):
    """Shared experts, their gate, sigmoid or softmax, renormalised or not, scaled: all of it stands in the gates."""
    teacher = through_adapter(checkpoint(name)[0])
    for moe in filter(None, map(moe_of, teacher.blocks)):
        moe.router.weight.data.zero_()
        if hasattr(moe.block, "shared_expert_gate"):
            moe.block.shared_expert_gate.weight.data.zero_()
    width = 4 * 48  # room for all neurons that work
    student = student_of(teacher, mlp_width=width)
    copied = initialise_student(student, teacher, BATCHES)
    residual = getattr(teacher.hub.config, "residual_multiplier", 1.0)
    for block, (x_BTD, y_BTD) in zip(student.blocks, what_parts_read_and_give(teacher, "mlp"), strict=True):
        assert relative_error(block.mlp(block.mlp_norm(x_BTD)), y_BTD * residual) < 1e-4  # eps of the norms differs
    assert copied["neurons"]["experts"] > 0 and copied["width"] == 32


@pytest.mark.parametrize("name", [name for name in CONFIGS if not name.startswith(NO_WARM_START)])
def test_attention_is_copied_where_heads_and_rotary_angles_fit(taken, name):
    teacher = taken(name)
    student = student_of(teacher)
    before = [block.attention.query.weight.clone() for block in student.blocks]
    copied = initialise_student(student, teacher, BATCHES)
    same_angles = teacher.shape.rope_theta is not None
    assert copied["values_and_outputs"] == 2 and copied["queries_and_keys"] == (2 if same_angles else 0)
    unchanged = [torch.equal(block.attention.query.weight, w) for block, w in zip(student.blocks, before, strict=True)]
    assert unchanged == [not same_angles] * 2
    rope = rope_table(0, 24, student.shape.head_dim, student.shape.rope_theta, None)
    residual = getattr(teacher.hub.config, "residual_multiplier", 1.0)
    limit = 0.001 if name.startswith("qwen3") else 0.4 if same_angles else 1.0  # only Qwen3 has the student's norms
    for block, (x_BTD, y_BTD) in zip(student.blocks, what_parts_read_and_give(teacher, "attention"), strict=True):
        assert relative_error(block.attention(block.attention_norm(x_BTD), rope), y_BTD * residual) < limit


def test_a_student_of_a_qwen3_is_that_qwen3(taken):
    student = student_of(taken("qwen3")).eval()
    initialise_student(student, taken("qwen3"), BATCHES)
    assert relative_error(logits(student), logits(taken("qwen3"))) < 0.002


def test_a_student_of_a_smaller_kind_takes_whole_groups_of_heads(taken):
    student = student_of(taken("qwen3_moe"), heads=2, kv_heads=1, width=16, layers=1)
    assert initialise_student(student, taken("qwen3_moe"), BATCHES)["queries_and_keys"] == 1
    student = student_of(taken("qwen3_moe"), heads=4, kv_heads=4)  # more keys than the teacher has
    assert initialise_student(student, taken("qwen3_moe"), BATCHES)["values_and_outputs"] == 0


def test_the_adapter_reads_a_deepseek_v3_as_our_own_class_does(tmp_path):
    save(new_model(TEACHER, seed=1), tmp_path)
    students = []
    for teacher in (load(tmp_path), through_adapter(tmp_path)):
        students.append(new_model(replace(STUDENT, vocab_size=TEACHER.vocab_size, width=TEACHER.width), seed=1))
        initialise_student(students[-1], teacher, [tokens_BT1 % TEACHER.vocab_size for tokens_BT1 in BATCHES])
    assert type(teacher) is AdapterModel
    for (name, ours), theirs in zip(students[0].named_parameters(), students[1].parameters(), strict=True):
        torch.testing.assert_close(theirs, ours, rtol=1e-3, atol=1e-4, msg=name)


@pytest.mark.parametrize(("name", "told"), [("gpt_oss", "biases"), ("gemma2", "no SwiGLU"), ("olmo2", "norms what")])
def test_a_family_that_no_dense_student_resembles_says_why(taken, name, told):
    with pytest.raises(
        Refusal, match=rf"no student starts from this teacher, as .*{told}.*: set distill.init to random"
    ):
        initialise_student(student_of(taken(name)), taken(name), BATCHES)


# ---- losses


def test_a_soft_cap_and_a_scale_go_through_the_chunked_losses_exactly():
    generator = torch.Generator().manual_seed(0)
    x_ND, teacher_x_NE = (torch.randn(30, size, generator=generator) for size in (8, 6))
    head_VD, teacher_head_VE = (torch.randn(20, size, generator=generator) for size in (8, 6))
    targets_N = torch.randint(20, (30,), generator=generator)
    cap, scale = LogitMap(cap=2.0), LogitMap(divisor=3.0)
    for after, teacher_after in ((cap, None), (None, cap), (LogitMap(2.0, 1.5), scale)):
        inputs = [part.clone().requires_grad_() for part in (x_ND, head_VD) * 2]
        z_NV, teacher_z_NV = inputs[0] @ inputs[1].T, teacher_x_NE @ teacher_head_VE.T
        z_NV = after(z_NV) if after else z_NV
        teacher_z_NV = teacher_after(teacher_z_NV) if teacher_after else teacher_z_NV
        hard = F.cross_entropy(z_NV, targets_N)
        soft = 4 * F.kl_div((z_NV / 2).log_softmax(-1), (teacher_z_NV / 2).log_softmax(-1), reduction="batchmean",
                            log_target=True)  # fmt: skip
        wanted = 0.7 * soft + 0.3 * hard
        for divergence in (forward_kl, lambda *arguments: forward_kl(*arguments)):  # by hand, and by autograd
            loss = DistillationLoss(divergence, 2.0, 0.7, chunk_tokens=7)
            found, _ = loss(*inputs[2:], teacher_x_NE, teacher_head_VE, targets_N, after, teacher_after)
            torch.testing.assert_close(found, wanted)
            gradients = (
                torch.autograd.grad(wanted, inputs[:2], retain_graph=True),
                torch.autograd.grad(found, inputs[2:]),
            )
            torch.testing.assert_close(*gradients)
        alone = next_token(*inputs[2:], targets_N, chunk_tokens=7, after=after)
        torch.testing.assert_close(alone, hard)
        gradients = torch.autograd.grad(hard, inputs[:2], retain_graph=True), torch.autograd.grad(alone, inputs[2:])
        torch.testing.assert_close(*gradients)


@pytest.mark.parametrize("name", ["gemma2", "granitemoe", "mixtral"])
def test_a_student_learns_from_the_teachers_logits_and_validation_sees_them(taken, name):
    teacher, student = taken(name), student_of(taken(name))
    outcome = Distillation(teacher, "forward_kl", 2.0, 1.0, 16)(student, TOKENS_BT1)
    teacher_BTV, student_BTV = logits(teacher), logits(student)
    log_q, log_p = ((part / 2).log_softmax(-1).flatten(0, 1) for part in (teacher_BTV, student_BTV))
    wanted = 4 * F.kl_div(log_p, log_q, reduction="batchmean", log_target=True)
    torch.testing.assert_close(outcome.loss.detach(), wanted)
    outcome.loss.backward()
    assert student.blocks[0].mlp.down.weight.grad.abs().sum() > 0 and teacher.head.weight.grad is None
    nats = F.cross_entropy(teacher_BTV.flatten(0, 1), TOKENS_BT1[:, 1:].flatten(), reduction="sum")
    torch.testing.assert_close(validation_nats(teacher, [TOKENS_BT1]), nats.double(), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", ["deepseek_v3 q_lora, groups, yarn", "mixtral", "gpt_oss", "gemma3_text"])
def test_such_a_model_trains_with_its_load_counted_once_whatever_is_recomputed(checkpoint, name):
    gradients = []
    for policy in ("none", "every_1", "mlp_2", "selective"):
        model = through_adapter(checkpoint(name)[0]).train()
        with checkpointing.checkpointed(model, policy):
            outcome = NextToken(balance_loss_weight=0.1)(model, TOKENS_BT1)
            outcome.loss.backward()
        moes = [moe for moe in map(moe_of, model.blocks) if moe is not None]
        assert [load.sum().item() for load in outcome.loads] == [2 * 4 * 24] * len(moes)
        gradients.append(torch.cat([p.grad.flatten() for p in model.parameters()]))
        if moes:
            assert outcome.parts["balance_loss"] >= 0.9 and moes[0].router.weight.grad.abs().sum() > 0
        model.balance(outcome.loads, 0.01)
    for found in gradients[1:]:
        torch.testing.assert_close(found, gradients[0])


@pytest.mark.parametrize("name", CONFIGS)
def test_under_autocast_a_model_trains_and_teaches_as_in_float32(checkpoint, taken, name):
    """As Lightning runs it where the machine has bfloat16 units."""
    model, student = through_adapter(checkpoint(name)[0]), student_of(taken(name))
    wanted = NextToken()(taken(name), TOKENS_BT1).loss.item()
    with torch.autocast("cpu", torch.bfloat16):
        outcome = NextToken()(model, TOKENS_BT1)
        taught = Distillation(taken(name), "forward_kl", 1.0, 0.5, 64)(student, TOKENS_BT1)
        outcome.loss.backward()
        taught.loss.backward()
    assert outcome.loss.item() == pytest.approx(wanted, rel=0.02) and taught.loss.isfinite()
    assert all(
        p.grad is not None and p.grad.dtype == torch.float32 and p.grad.isfinite().all() for p in model.parameters()
    )


def test_a_fresh_model_depends_on_the_seed_and_can_be_deeper(taken):
    for name in ("gemma3_text", "deepseek_v3 q_lora, groups, yarn", "smollm3"):
        deep = replace(taken(name).shape, layers=4)
        first, second, other = (new_model(deep, seed) for seed in (1, 1, 2))
        assert torch.equal(logits(first), logits(second)) and not torch.equal(logits(first), logits(other))
        assert len(first.blocks) == 4 and logits(first).isfinite().all()
        assert not any(part.is_meta for part in (*first.hub.parameters(), *first.hub.buffers()))


# ---- pruning


def pruned(model, keep, multiple=8):
    return prune(model, keep, importance(model, [TOKENS_BT1], WORDS), multiple)


def kinds(name):
    """What of it can be pruned."""
    found = ["neurons"] if not name.startswith("gpt_oss") else []
    found += ["heads"] if not name.startswith("olmo") else []
    return found + (["experts"] if name in MIXTURES and "groups" not in name else [])


@pytest.mark.parametrize("name", CONFIGS)
def test_a_pruned_model_is_smaller_as_its_config_says_and_transformers_gives_its_logits(taken, name, tmp_path):
    transformers = pytest.importorskip("transformers")
    dense = taken(name)
    sparse = pruned(dense, dict.fromkeys(kinds(name), 0.5))
    config, heads = sparse.hub.config, 2 if "heads" in kinds(name) else 4
    assert config.num_attention_heads == heads and sparse.blocks[0].attention.o_proj.in_features == 8 * heads
    for block, old in zip(sparse.blocks, dense.blocks, strict=True):
        if (moe := moe_of(block)) is not None:
            experts, per = len(moe_of(old).down), 2 if "experts" in kinds(name) else 1
            assert len(moe.down) == len(moe.router.weight) == experts // per
            assert moe.down.shape[2] * (2 if "neurons" in kinds(name) else 1) == moe_of(old).down.shape[2]
    assert total_parameters(sparse) < total_parameters(dense)
    assert flops_per_token(sparse.shape, 24)["total"] < flops_per_token(dense.shape, 24)["total"]
    save(sparse, tmp_path)
    read, found = transformers.AutoModelForCausalLM.from_pretrained(tmp_path, output_loading_info=True)
    assert not any(found.values())
    assert torch.equal(logits(read.eval()), logits(sparse)) and torch.equal(logits(load(tmp_path)), logits(sparse))
    assert (sparse.head.weight is sparse.embedding.weight) == bool(config.tie_word_embeddings)
    NextToken()(sparse, TOKENS_BT1).loss.backward()
    assert all(p.grad is not None for p in sparse.parameters())


@pytest.mark.parametrize("name", ["qwen2_moe", "gemma2", "deepseek_v3 q_lora", "smollm3", "granitemoe"])
def test_units_that_write_nothing_leave_without_a_trace(checkpoint, name):
    model = through_adapter(checkpoint(name)[0])
    with torch.no_grad():
        for place in AdapterFamily().prunable(model):
            if place.kind == "experts":
                continue  # a router without a row chooses otherwise
            weight = place.cuts[0 if not place.stacked else 1].tensor  # what writes to the residual stream
            part = model.state_dict()[weight]
            part.unflatten(-1, (place.units, -1))[..., ::2, :] = 0
    sparse = pruned(model, {"heads": 0.5, "neurons": 0.5}, multiple=4)
    torch.testing.assert_close(logits(sparse), logits(model))


def test_experts_that_no_token_chooses_leave_without_a_trace(checkpoint):
    model = through_adapter(checkpoint("deepseek_v3 q_lora")[0])
    for moe in filter(None, map(moe_of, model.blocks)):
        moe.router.e_score_correction_bias[::2] = -100
    torch.testing.assert_close(logits(pruned(model, {"experts": 0.5})), logits(model))


@pytest.mark.parametrize(
    ("name", "keep", "told"),
    [
        ("gpt_oss", {"neurons": 0.5}, r"keep_neurons: GPT-OSS is not pruned there, as its experts have biases"),
        ("gpt_oss", {"experts": 0.5}, r"keep_experts: GPT-OSS is not pruned there"),
        ("deepseek_v3 q_lora, groups, yarn", {"experts": 0.5}, "keep_experts: this DeepSeek-V3 chooses among 4 groups"),
        ("olmoe", {"heads": 0.5}, "keep_heads: OLMoE norms the queries and keys of all heads together"),
        ("olmo2", {"heads": 0.5}, "keep_heads: OLMo-2 norms the queries and keys of all heads together"),
        ("llama", {"experts": 0.5}, "keep_experts = 0.5: a model of the family transformers has none: set it to 1"),
    ],
)
def test_what_cannot_be_pruned_is_refused_in_one_line(taken, name, keep, told):
    with pytest.raises(Refusal, match=told):
        pruned(taken(name), keep)


def test_active_parameters_leave_out_the_experts_that_a_token_is_not_sent_to(taken):
    model = taken("mixtral")
    assert total_parameters(model) - active_parameters(model) == 2 * 2 * 3 * 32 * 48  # layers, experts of 3 matrices
    assert active_parameters(taken("llama")) == total_parameters(taken("llama"))


def test_a_varying_number_of_experts_is_refused_for_routers_of_others(taken):
    with pytest.raises(Refusal, match="sparsify.teacher.expert_choice = confidence: .* set it to fixed"):
        mean_count(taken("mixtral").shape, {"experts_per_token": 0.5}, "confidence", BATCHES)


# ---- the table of families


HEADER = """| family | tried as | logits | operations | student of it | can be pruned |
| --- | --- | --- | --- | --- | --- |"""


def row_of(name, theirs, ours):
    """What holds of a family, tried here."""
    kind, _, what = name.partition(" ")
    equal = "equal" if torch.equal(logits(theirs), logits(ours)) else "differ"
    counted, by_formula = operations(name, ours)
    count = "equal" if abs(counted - by_formula) < 1e-6 * counted else "differ"
    count += " with masked pairs" * name.startswith(SQUARE)
    try:
        copied = initialise_student(student_of(ours), ours, BATCHES[:1])
        parts = {"MLP": copied["blocks"], "values": copied["values_and_outputs"], "queries": copied["queries_and_keys"]}
        start = ", ".join(part for part, blocks in parts.items() if blocks)
    except Refusal:
        start = "random only"
    can = []
    for structure in ("heads", "neurons", "experts"):
        try:
            pruned_shape(ours.shape, {structure: 0.5})
            can.append(structure)
        except Refusal:
            pass
    return f"| {KNOWN[kind]} | {what or 'default'} | {equal} | {count} | {start} | {', '.join(can)} |"


def test_the_table_of_families_in_the_documentation_is_what_holds(checkpoint, taken):
    rows = [row_of(name, checkpoint(name)[1], taken(name)) for name in CONFIGS]
    assert {name.split()[0] for name in CONFIGS} == set(KNOWN)  # none is claimed that was not tried
    assert "\n".join([HEADER, *rows]) in (ROOT / "docs/own_models.md").read_text()
