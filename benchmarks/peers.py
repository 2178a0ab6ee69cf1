"""transformers' models as peers, of our sizes: those that this machine can run, and a line for each that it cannot.

DeepseekV3 is our architecture and, given our weights, our numbers (tests/test_benchmarks.py); Mixtral has the same
experts under grouped-query attention; Qwen3 is dense, as wide and deep as ours and with as many operations per
token.
"""

import importlib.util
import tempfile
import warnings
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path

import torch
from torch import nn

from benchmarks.timing import DEVICE
from stages.measure.flops import flops_per_token
from stages.model.families.deepseek_v3.model import DeepseekV3 as Teacher
from stages.model.families.deepseek_v3.model import DeepseekV3Shape as TeacherShape
from stages.model.families.qwen3.model import Qwen3Shape as StudentShape

EXPERTS_IMPLEMENTATIONS = ("eager", "grouped_mm", "batched_mm")
Peer = tuple[str, Callable[[], nn.Module]]
INSTALL = "peer left out: transformers is not installed; get it with `make env` or pip install -e '.[test]'"


def transformers_is_here() -> bool:
    return importlib.util.find_spec("transformers") is not None


def peer_model(kind: str, implementation: str, shape: TeacherShape) -> nn.Module:
    """With fresh weights; raises ImportError where transformers is missing."""
    import transformers

    common = {
        "vocab_size": shape.vocab_size, "max_position_embeddings": shape.sequence_tokens,
        "hidden_size": shape.width, "num_hidden_layers": shape.layers, "num_attention_heads": shape.heads,
    }  # fmt: skip
    if kind == "Qwen3":
        dense = dense_shape(shape)
        config = transformers.Qwen3Config(
            num_key_value_heads=dense.kv_heads, head_dim=dense.head_dim, intermediate_size=dense.mlp_width,
            tie_word_embeddings=False, **common,
        )  # fmt: skip
        with DEVICE:
            return transformers.Qwen3ForCausalLM._from_config(config)
    common |= {"num_key_value_heads": shape.heads, "num_experts_per_tok": shape.experts_per_token}
    if kind == "Mixtral":
        model_type = transformers.MixtralForCausalLM
        config = transformers.MixtralConfig(
            num_local_experts=shape.experts, intermediate_size=shape.expert_width, **common
        )
    else:
        model_type = transformers.DeepseekV3ForCausalLM
        config = transformers.DeepseekV3Config(
            n_routed_experts=shape.experts, moe_intermediate_size=shape.expert_width,
            n_shared_experts=shape.shared_experts, intermediate_size=shape.dense_width,
            first_k_dense_replace=shape.dense_layers, n_group=1, topk_group=1,
            routed_scaling_factor=shape.route_scale, q_lora_rank=None, kv_lora_rank=shape.latent_width,
            qk_nope_head_dim=shape.nope_head_dim, qk_rope_head_dim=shape.rope_head_dim,
            v_head_dim=shape.value_head_dim, num_nextn_predict_layers=0, **common,
        )  # fmt: skip
    with warnings.catch_warnings(), DEVICE:  # a shared expert of width 0 warns that there is nothing to initialise
        warnings.simplefilter("ignore")
        return model_type._from_config(config, experts_implementation=implementation)


def twin(ours: Teacher, implementation: str) -> nn.Module:
    """DeepseekV3 with our weights; raises ImportError where transformers, or the safetensors it needs, is missing."""
    import transformers

    from stages.model import hub as models  # late: it needs safetensors, which a machine without transformers may lack

    transformers.utils.logging.disable_progress_bar()
    with tempfile.TemporaryDirectory() as folder:
        models.save(ours, Path(folder))
        load = transformers.DeepseekV3ForCausalLM.from_pretrained
        return load(folder, experts_implementation=implementation).to(DEVICE).eval()


def dense_shape(shape: TeacherShape) -> StudentShape:
    """The dense model that costs as much per token: attention of the same heads, the rest in its MLPs."""
    dense = StudentShape(
        vocab_size=shape.vocab_size, sequence_tokens=shape.sequence_tokens, layers=shape.layers, width=shape.width,
        heads=shape.heads, kv_heads=shape.heads, head_dim=shape.value_head_dim, mlp_width=0,
        rope_theta=shape.rope_theta,
    )  # fmt: skip
    ours, without_mlp = (flops_per_token(of, shape.sequence_tokens)["total"] for of in (shape, dense))
    return replace(dense, mlp_width=round((ours - without_mlp) / (6 * shape.width * shape.layers)))


def batched_mm_bytes(shape: TeacherShape, tokens: int) -> int:
    """batched_mm copies the expert's weights for every routed row and keeps them for the backward pass, where the
    gradients of one layer's copies join them."""
    return 12 * shape.expert_width * shape.width * shape.experts_per_token * tokens * (shape.layers + 1)


def too_large(name: str, needed: int) -> str:
    """Why a peer that needs so many bytes is left out; nothing where it fits."""
    free = free_bytes()
    if needed <= free:
        return ""
    return f"peer left out: {name} would take {needed / 1e9:.0f} GB, {free / 1e9:.0f} GB are free"


def free_bytes() -> int:
    if DEVICE.type == "cuda":
        return torch.cuda.mem_get_info()[0]
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
        return 1024 * next(int(line.split()[1]) for line in lines if line.startswith("MemAvailable"))
    except (OSError, StopIteration):
        return 8 * 2**30


def peer_models(shape: TeacherShape, tokens: int, kinds: tuple[str, ...]) -> Iterator[Peer | str]:
    """Name and maker of each mixture of experts that can run here; a line for each that cannot."""
    if not transformers_is_here():
        yield INSTALL
        return
    for kind in kinds:
        for implementation in EXPERTS_IMPLEMENTATIONS:
            name = f"transformers {kind} {implementation}"
            needed = batched_mm_bytes(shape, tokens) if implementation == "batched_mm" else 0
            size = f"{shape.layers} layers of {shape.experts} experts, {tokens} tokens"
            if why := too_large(f"{name} ({size})", needed):
                yield why
                continue
            yield name, partial(peer_model, kind, implementation, shape)
