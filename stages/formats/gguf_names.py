"""Tensors of dense models in GGUF and in Hugging Face folders: their names, and the one layout that differs."""

import numpy as np

# their name in a block -> ours; and those that only one architecture has
BLOCK = {
    "attn_norm.weight": "input_layernorm.weight",
    "attn_q.weight": "self_attn.q_proj.weight",
    "attn_k.weight": "self_attn.k_proj.weight",
    "attn_v.weight": "self_attn.v_proj.weight",
    "attn_output.weight": "self_attn.o_proj.weight",
    "ffn_norm.weight": "post_attention_layernorm.weight",
    "ffn_gate.weight": "mlp.gate_proj.weight",
    "ffn_up.weight": "mlp.up_proj.weight",
    "ffn_down.weight": "mlp.down_proj.weight",
}
ONLY = {
    "llama": {},
    "qwen2": {f"attn_{part}.bias": f"self_attn.{part}_proj.bias" for part in "qkv"},
    "qwen3": {f"attn_{part}_norm.weight": f"self_attn.{part}_norm.weight" for part in "qk"},
}
HEAD = "output.weight"  # a file of a tied model lacks it


def names_of(architecture: str, layers: int) -> dict[str, str]:
    """GGUF's name of each tensor -> the Hugging Face one."""
    names = {"token_embd.weight": "model.embed_tokens.weight", "output_norm.weight": "model.norm.weight"}
    names[HEAD] = "lm_head.weight"
    for layer in range(layers):
        for theirs, ours in (BLOCK | ONLY[architecture]).items():
            names[f"blk.{layer}.{theirs}"] = f"model.layers.{layer}.{ours}"
    return names


def rotated_heads(architecture: str, name: str, heads: int, kv_heads: int) -> int:
    """In how many heads a tensor of this Hugging Face name has its rows in another order; 0: none."""
    part = name.removesuffix(".weight").rpartition(".")[2]
    return {"q_proj": heads, "k_proj": kv_heads}.get(part, 0) if architecture in ("llama", "mistral") else 0


def pairs_from_halves(values: np.ndarray, heads: int) -> np.ndarray:
    """To GGUF's order: Llama rotates pairs of neighbours there, and in transformers the halves of a head."""
    return _swapped(values, heads, 2, len(values) // heads // 2) if heads else values


def halves_from_pairs(values: np.ndarray, heads: int) -> np.ndarray:
    """The inverse."""
    return _swapped(values, heads, len(values) // heads // 2, 2) if heads else values


def _swapped(values: np.ndarray, heads: int, outer: int, inner: int) -> np.ndarray:
    split = values.reshape(heads, outer, inner, *values.shape[1:])
    return np.ascontiguousarray(split.swapaxes(1, 2)).reshape(values.shape)
