"""Building, saving and loading of teacher and student.

A model on disk is a Hugging Face folder: config.json and model.safetensors, in the names that transformers'
DeepseekV3ForCausalLM (teacher, sigmoid gating) and Qwen3ForCausalLM (student) read with from_pretrained. A
teacher with softmax gating has no equal there (transformers always applies a sigmoid): it is saved
with "scoring_func": "softmax" under a model type of its own, which AutoModel refuses.

Saving is a pure function of the weights: same model, same bytes. config.json records the weights' SHA-256 and
its own.
"""

from __future__ import annotations

import hashlib
import json
import math
from dataclasses import fields
from pathlib import Path
from typing import Any

import safetensors
import safetensors.torch
import torch
from torch import Tensor

from stages.files.artifacts import Refusal, read_json, sha256_of, write_atomically, write_json
from stages.model.hub_names import from_hub, to_hub
from stages.model.kernels.norm import NORM_EPSILON
from stages.model.layers import INIT_STD, initialise
from stages.model.student import Student, StudentShape
from stages.model.teacher import Teacher, TeacherShape

WEIGHTS, CONFIG = "model.safetensors", "config.json"
SOFTMAX_TEACHER = "offramp_softmax_moe"  # no such type in transformers, on purpose


# ---- build -------------------------------------------------------------------------------------------------


def build_teacher(settings: Any, vocab_size: int, sequence_tokens: int, seed: int) -> Teacher:
    """A new teacher; settings is the section `teacher` (its training knobs are not part of the shape)."""
    return new_model(_shape_of(TeacherShape, settings, vocab_size, sequence_tokens), seed)


def build_student(settings: Any, vocab_size: int, sequence_tokens: int, seed: int) -> Student:
    return new_model(_shape_of(StudentShape, settings, vocab_size, sequence_tokens), seed)


def _shape_of(kind: type, settings: Any, vocab_size: int, sequence_tokens: int):
    given = {"vocab_size": vocab_size, "sequence_tokens": sequence_tokens}
    for field in fields(kind):
        if field.name not in given:
            given[field.name] = getattr(settings, field.name)
    return kind(**given)


def new_model(shape: TeacherShape | StudentShape, seed: int) -> Teacher | Student:
    """A model of this shape with fresh weights that depend on the seed alone."""
    model = _empty(shape).to_empty(device="cpu")
    initialise(model, shape.layers, seed)
    return model


def _empty(shape: TeacherShape | StudentShape) -> Teacher | Student:
    check_shape(shape)
    with torch.device("meta"):  # no memory and no random numbers spent on weights that are overwritten
        return Teacher(shape) if isinstance(shape, TeacherShape) else Student(shape)


def check_shape(shape: TeacherShape | StudentShape, where: str = "the model's shape") -> None:
    def require(holds: bool, rule: str) -> None:
        if not holds:
            raise Refusal(f"{where}: {rule}")

    may_be_zero = {"dense_layers", "shared_experts", "nope_head_dim"}
    for field in fields(shape):
        value = getattr(shape, field.name)
        if not isinstance(value, str):
            require(
                value >= (0 if field.name in may_be_zero else 1e-9), f"{field.name} ({value}) is too small"
            )
    if isinstance(shape, TeacherShape):
        require(shape.gating in ("sigmoid", "softmax"), f"gating ({shape.gating!r}) must be sigmoid or softmax")
        require(
            shape.dense_layers <= shape.layers,
            f"dense_layers ({shape.dense_layers}) must not exceed layers ({shape.layers})",
        )
        require(
            shape.experts_per_token <= shape.experts,
            f"experts_per_token ({shape.experts_per_token}) must not exceed experts ({shape.experts})",
        )
        require(shape.rope_head_dim % 2 == 0, f"rope_head_dim ({shape.rope_head_dim}) must be even")
    else:
        require(
            shape.heads % shape.kv_heads == 0,
            f"heads ({shape.heads}) must be divisible by kv_heads ({shape.kv_heads})",
        )
        require(shape.head_dim % 2 == 0, f"head_dim ({shape.head_dim}) must be even")


# ---- save --------------------------------------------------------------------------------------------------


def save(
    model: Teacher | Student,
    folder: Path | str,
    end_of_text: int | None = None,
    tokenizer_sha256: str | None = None,
) -> None:
    """Writes the Hugging Face folder.

    end_of_text is the token at which generation stops; tokenizer_sha256 names the tokenizer that the model speaks.
    """
    folder = Path(folder)
    tensors = {name: part.detach().float().cpu().contiguous() for name, part in to_hub(model).items()}
    broken = [name for name, part in tensors.items() if not torch.isfinite(part).all()]
    if broken:
        raise Refusal(f"{folder}: not saved, {broken[0]} holds a non-finite number: lower the learning rate")
    # transformers reads no safetensors file without this format mark
    write_atomically(folder / WEIGHTS, safetensors.torch.save(tensors, metadata={"format": "pt"}))
    config = _teacher_config(model.shape) if isinstance(model, Teacher) else _student_config(model.shape)
    config |= {
        "bos_token_id": None,
        "eos_token_id": end_of_text,
        "pad_token_id": None,
        "dtype": "float32",
        "rms_norm_eps": NORM_EPSILON,
        "hidden_act": "silu",
        "attention_bias": False,
        "attention_dropout": 0.0,
        "tie_word_embeddings": False,
        "initializer_range": INIT_STD,
        "use_cache": True,
        "weights_sha256": sha256_of(folder / WEIGHTS),
        "tokenizer_sha256": tokenizer_sha256,
    }
    write_json(folder / CONFIG, config)
    config = read_json(folder / CONFIG)  # as rounded, so that the reader's checksum is of the same numbers
    write_json(folder / CONFIG, config | {"config_sha256": _config_sha256(config)})


def _config_sha256(config: dict[str, Any]) -> str:
    rest = {key: value for key, value in config.items() if key != "config_sha256"}
    return hashlib.sha256(json.dumps(rest, sort_keys=True).encode()).hexdigest()


# our field -> the name in config.json
_COMMON = {
    "vocab_size": "vocab_size",
    "sequence_tokens": "max_position_embeddings",
    "layers": "num_hidden_layers",
    "width": "hidden_size",
    "heads": "num_attention_heads",
    "rope_theta": "rope_theta",
}
_TEACHER = _COMMON | {
    "dense_layers": "first_k_dense_replace",
    "nope_head_dim": "qk_nope_head_dim",
    "rope_head_dim": "qk_rope_head_dim",
    "value_head_dim": "v_head_dim",
    "latent_width": "kv_lora_rank",
    "dense_width": "intermediate_size",
    "experts": "n_routed_experts",
    "experts_per_token": "num_experts_per_tok",
    "shared_experts": "n_shared_experts",
    "expert_width": "moe_intermediate_size",
    "gating": "scoring_func",
    "route_scale": "routed_scaling_factor",
}
_STUDENT = _COMMON | {
    "kv_heads": "num_key_value_heads",
    "head_dim": "head_dim",
    "mlp_width": "intermediate_size",
}

# what our arithmetic takes for granted; a folder that says otherwise is refused
_TEACHER_FIXED = {
    "q_lora_rank": None,
    "n_group": 1,
    "topk_group": 1,
    "norm_topk_prob": True,
    "rope_interleave": True,
    "num_nextn_predict_layers": 0,
}
_FIXED = {
    "attention_bias": False,
    "tie_word_embeddings": False,
    "hidden_act": "silu",
    "rms_norm_eps": NORM_EPSILON,
}


def _hub_fields(shape: TeacherShape | StudentShape, names: dict[str, str]) -> dict[str, Any]:
    # rope_parameters is what transformers 5 reads, rope_theta what everything older reads
    rope = {"rope_parameters": {"rope_type": "default", "rope_theta": shape.rope_theta}}
    return {hub: getattr(shape, ours) for ours, hub in names.items()} | rope


def _teacher_config(shape: TeacherShape) -> dict[str, Any]:
    softmax = shape.gating == "softmax"
    return (
        _hub_fields(shape, _TEACHER)
        | _TEACHER_FIXED
        | {
            "architectures": ["OfframpSoftmaxTeacher" if softmax else "DeepseekV3ForCausalLM"],
            "model_type": SOFTMAX_TEACHER if softmax else "deepseek_v3",
            "num_key_value_heads": shape.heads,
            "topk_method": "greedy" if softmax else "noaux_tc",
            "moe_layer_freq": 1,
        }
    )


def _student_config(shape: StudentShape) -> dict[str, Any]:
    return _hub_fields(shape, _STUDENT) | {
        "architectures": ["Qwen3ForCausalLM"],
        "model_type": "qwen3",
        "use_sliding_window": False,
    }


# ---- load --------------------------------------------------------------------------------------------------


def load(folder: Path | str) -> Teacher | Student:
    """The model of a folder, in eval mode; a damaged, altered or foreign folder is refused in one line."""
    folder = Path(folder)
    config = read_json(folder / CONFIG)
    shape = _shape_from(config, folder / CONFIG)
    tensors = _read_weights(folder / WEIGHTS, config.get("weights_sha256"))
    _refuse_larger_than(tensors, shape, folder / CONFIG)
    model = _empty(shape)
    expected = {name: part.shape for name, part in to_hub(model).items()}
    _check_weights(tensors, expected, folder / WEIGHTS)
    model.load_state_dict(from_hub(tensors, model), strict=True, assign=True)
    return model.requires_grad_().eval()


def _shape_from(config: Any, path: Path) -> TeacherShape | StudentShape:
    if isinstance(config, dict) and config.get("config_sha256", (own := _config_sha256(config))) != own:
        raise Refusal(
            f"{path} is not the file that was saved (SHA-256 differs): run dvc repro again, "
            "or remove config_sha256 from it if you changed it on purpose"
        )
    kind = config.get("model_type") if isinstance(config, dict) else None
    if kind not in ("deepseek_v3", SOFTMAX_TEACHER, "qwen3"):
        raise Refusal(f"{path}: model_type {kind!r} is neither deepseek_v3 (teacher) nor qwen3 (student)")
    is_student = kind == "qwen3"
    for key, value in (_FIXED if is_student else _FIXED | _TEACHER_FIXED).items():
        if config.get(key, value) != value:
            raise Refusal(f"{path}: {key} is {config[key]!r}, only {value!r} is supported")
    rope = config.get("rope_parameters") or {}
    if not isinstance(rope, dict) or rope.get("rope_type", "default") != "default" or config.get("rope_scaling"):
        raise Refusal(f"{path}: scaled rotary positions are not supported, only rope_type 'default'")
    config = {"rope_theta": rope.get("rope_theta")} | config
    if not is_student:
        config = {"scoring_func": "sigmoid"} | config
    shape_type, names = (StudentShape, _STUDENT) if is_student else (TeacherShape, _TEACHER)
    given: dict[str, Any] = {}
    for field in fields(shape_type):
        value = config.get(names[field.name])
        wanted: Any = {"int": int, "float": (int, float), "str": str}[str(field.type)]
        if not isinstance(value, wanted) or isinstance(value, bool) or value in (math.inf, -math.inf):
            raise Refusal(
                f"{path}: {names[field.name]} is {value!r}, expected {field.type}: restore the file"
            )
        given[field.name] = float(value) if field.type == "float" else value
    shape = shape_type(**given)
    check_shape(shape, str(path))
    return shape


def _read_weights(path: Path, recorded: str | None) -> dict[str, Tensor]:
    if not path.is_file():
        raise Refusal(f"{path} is missing: run the stage that writes it (dvc repro)")
    try:
        tensors = safetensors.torch.load_file(path)
    except (safetensors.SafetensorError, ValueError, OSError) as error:
        reason = " ".join(str(error).split())[:200]
        raise Refusal(f"{path} is damaged ({reason}): delete it and run dvc repro again") from None
    if recorded is not None and sha256_of(path) != recorded:
        raise Refusal(
            f"{path} is not the file that was saved (SHA-256 differs from {CONFIG}): run dvc repro again, "
            f"or remove weights_sha256 from {CONFIG} if you changed the weights on purpose"
        )
    return tensors


def _refuse_larger_than(tensors: dict[str, Tensor], shape: TeacherShape | StudentShape, path: Path) -> None:
    """Before a model is built: one of 10**9 layers would keep the machine busy until it is out of memory."""
    numbers = sum(part.numel() for part in tensors.values())
    for field in fields(shape):
        most = len(tensors) if field.name in ("layers", "experts") else numbers
        if field.type == "int" and field.name != "sequence_tokens" and getattr(shape, field.name) > most:
            raise Refusal(f"{path}: {field.name} ({getattr(shape, field.name)}) is more than {WEIGHTS} can hold")


def _check_weights(tensors: dict[str, Tensor], expected: dict[str, torch.Size], path: Path) -> None:
    if missing := sorted(expected.keys() - tensors.keys()):
        raise Refusal(
            f"{path} lacks {missing[0]} ({len(missing)} missing): weights and {CONFIG} do not match"
        )
    if unknown := sorted(tensors.keys() - expected.keys()):
        raise Refusal(f"{path} has {unknown[0]} ({len(unknown)} unknown): weights and {CONFIG} do not match")
    for name, shape in expected.items():
        if tensors[name].shape != shape:
            raise Refusal(f"{path}: {name} is {list(tensors[name].shape)}, {CONFIG} says {list(shape)}")
        if not tensors[name].is_floating_point():
            raise Refusal(f"{path}: {name} is {tensors[name].dtype}, expected floating point")
        if not torch.isfinite(tensors[name]).all():
            raise Refusal(f"{path}: {name} holds a non-finite number: train the model again")
