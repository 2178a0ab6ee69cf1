"""Families that transformers computes, each on a small checkpoint that transformers itself wrote.

The table of families in docs/own_models.md is made by `row_of`, which tries what it states.
"""

import json
import re
import shutil
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file

from stages.compress.pruning import prune
from stages.compress.scores import importance
from stages.compress.warm_start import initialise_student
from stages.files.artifacts import Refusal
from stages.measure.flops import active_parameters, counted_flops_per_token, flops_per_token, total_parameters
from stages.model import checkpointing
from stages.model.families.adapter import family as adapter_family
from stages.model.families.adapter.family import AdapterFamily
from stages.model.families.adapter.model import AdapterModel, LogitMap, moe_of
from stages.model.families.adapter.shape import KNOWN
from stages.model.families.qwen3.model import Qwen3Shape
from stages.model.generation import generate
from stages.model.hub import load, new_model, save
from stages.model.losses import DistillationLoss, next_token
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
def test_logits_are_those_of_transformers_to_the_last_bit(checkpoint, taken, name):
    theirs, ours = logits(checkpoint(name)[1]), logits(taken(name))
    assert theirs.std() > 0.1
    assert torch.equal(ours, theirs)


@pytest.mark.parametrize("name", CONFIGS)
def test_operations_by_formula_are_those_that_run(taken, name):
    """The formula counts the keys that a token may see; some kernels compute the others too and mask them."""
    model, T = taken(name), 24
    by_formula = flops_per_token(model.shape, T)
    masked = 0.0
    if name.startswith(SQUARE):
        config = model.hub.config
        keys = sum(adapter_family._keys(config, layer, T) for layer in range(model.shape.layers))
        masked = adapter_family._scores_per_key(config) * (model.shape.layers * T - keys)
    assert counted_flops_per_token(model, T) == pytest.approx(by_formula["total"] + masked, rel=1e-9)


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
    refused(tmp_path, rf"{shard.name} is missing, which model.safetensors.index.json names: copy all shards")


def refused(folder, told):
    with pytest.raises(Refusal, match=told) as found:
        load(folder)
    assert "\n" not in str(found.value) and str(folder) in str(found.value)


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ({"model_type": "bloom"}, "model_type 'bloom' is not supported, only .*deepseek_v2, .*mixtral, .*gpt_oss"),
        ({"auto_map": {"AutoModel": "x.Y"}}, "auto_map names code .* no code of a folder is run"),
        ({"quantization_config": {"quant_method": "fp8"}}, "quantised.* save the model dequantised"),
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
    refused(folder, "model.safetensors is damaged .* copy it again")
    weights.rename(folder / "pytorch_model.bin")
    refused(folder, "pytorch_model.bin may run code when it is read, and is not: save the model as safetensors")
    (folder / "pytorch_model.bin").unlink()
    refused(folder, "model.safetensors is missing: copy the model's safetensors files there")


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


def test_every_known_family_is_tried_here():
    assert {name.split()[0] for name in CONFIGS} == set(KNOWN)
