"""Building, saving and loading of models of any family.

A model on disk is a Hugging Face folder: config.json and model.safetensors, in the names that transformers' own
class of the family reads with from_pretrained.

Saving is a pure function of the weights: same model, same bytes. config.json records the weights' SHA-256 and
its own.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import MISSING, fields
from pathlib import Path
from typing import Any

import safetensors
import safetensors.torch
import torch
from torch import Tensor

from stages.files.artifacts import Refusal, read_json, sha256_of, write_atomically, write_json
from stages.files.weight_files import CONFIG, INDEX, WEIGHTS, refuse_foreign, refuse_larger_than_memory, weight_files
from stages.model.families.deepseek_v3.model import DeepseekV3, DeepseekV3Shape
from stages.model.families.hub_layout import EMBEDDING, HEAD
from stages.model.families.qwen3.model import Qwen3, Qwen3Shape
from stages.model.families.registry import family_of, shape_of

RESTORE = "copy the folder again"
NO_WEIGHT = ".rotary_emb.inv_freq"  # in old files, computed anew by everyone


# ---- build -------------------------------------------------------------------------------------------------


def build_teacher(settings: Any, vocab_size: int, sequence_tokens: int, seed: int) -> DeepseekV3:
    """A new teacher; settings is the section `teacher` (its training knobs are not part of the shape)."""
    return new_model(_shape_of(DeepseekV3Shape, settings, vocab_size, sequence_tokens), seed)


def build_student(settings: Any, vocab_size: int, sequence_tokens: int, seed: int) -> Qwen3:
    """A new student; settings is the section `student`."""
    return new_model(_shape_of(Qwen3Shape, settings, vocab_size, sequence_tokens), seed)


def _shape_of(kind: type, settings: Any, vocab_size: int, sequence_tokens: int) -> Any:
    given = {"vocab_size": vocab_size, "sequence_tokens": sequence_tokens}
    for field in fields(kind):
        if field.name not in given and (field.default is MISSING or hasattr(settings, field.name)):
            given[field.name] = getattr(settings, field.name)
    return kind(**given)


def new_model(shape: Any, seed: int) -> Any:
    """A model of this shape with fresh weights that depend on the seed alone; an impossible shape is refused."""
    model = empty_model(shape)
    family_of(shape).initialise(model, seed)
    return model


def empty_model(shape: Any) -> Any:
    """A model of this shape whose weights are on the meta device: no memory and no random numbers spent on them."""
    check_shape(shape)
    with torch.device("meta"):
        return family_of(shape).build(shape)


def check_shape(shape: Any, where: str = "the model's shape") -> None:
    """Refuses the first rule of its family that a shape breaks; `where` is for the message."""
    for field, rule in family_of(shape).broken_rules(shape):
        raise Refusal(f"{where}: {field} ({getattr(shape, field)!r}) {rule}")


# ---- save --------------------------------------------------------------------------------------------------


def save(
    model: Any,
    folder: Path | str,
    end_of_text: int | None = None,
    tokenizer_sha256: str | None = None,
) -> None:
    """Writes the Hugging Face folder.

    end_of_text is the token at which generation stops; tokenizer_sha256 names the tokenizer that the model speaks.
    """
    folder = Path(folder)
    family = family_of(model.shape)
    tensors = {name: part.detach().float().cpu().contiguous() for name, part in family.to_hub(model).items()}
    broken = [name for name, part in tensors.items() if not _is_finite(part)]
    if broken:
        raise Refusal(f"{folder}: not saved, {broken[0]} holds a non-finite number: lower the learning rate")
    # transformers reads no safetensors file without this format mark
    write_atomically(folder / WEIGHTS, safetensors.torch.save(tensors, metadata={"format": "pt"}))
    config = family.config_of(model.shape) | {
        "bos_token_id": None,
        "eos_token_id": end_of_text,
        "pad_token_id": None,
        "dtype": "float32",
        "weights_sha256": sha256_of(folder / WEIGHTS),
        "tokenizer_sha256": tokenizer_sha256,
    }
    write_json(folder / CONFIG, config | {"config_sha256": _config_sha256(config)})


def _is_finite(part: Tensor) -> bool:
    """Without the copies that isfinite makes."""
    return part.numel() == 0 or all(torch.isfinite(end).item() for end in part.aminmax())


def _config_sha256(config: dict[str, Any]) -> str:
    rest = {key: value for key, value in config.items() if key != "config_sha256"}
    return hashlib.sha256(json.dumps(rest, sort_keys=True).encode()).hexdigest()


# ---- load --------------------------------------------------------------------------------------------------


def load(folder: Path | str) -> Any:
    """The model of a folder, in eval mode; a damaged, altered or foreign folder is refused in one line.

    A folder of transformers' is read too, in one file or several, where its family and config are among ours. The tied
    head of a family that ties none becomes a matrix of its own, which costs its memory and changes no logit. A file is
    let go before the next is read: memory holds the model and one file at most.
    """
    folder = Path(folder)
    config = read_json(folder / CONFIG)
    shape = shape_from(config, folder / CONFIG)
    refuse_larger_than_memory(weight_files(folder), folder)
    if (model := family_of(shape).read(folder, shape, config.get("weights_sha256"))) is not None:
        return model.requires_grad_().eval()
    tensors = _read_folder(folder, config.get("weights_sha256"))
    _refuse_larger_than(tensors, shape, folder / CONFIG)
    family, model = family_of(shape), empty_model(shape)
    expected = {name: part.shape for name, part in family.to_hub(model).items()}
    if config.get("tie_word_embeddings"):
        _settle_head(tensors, HEAD in expected, folder / CONFIG)
    _check_weights(tensors, expected, folder, "train the model again" if "weights_sha256" in config else RESTORE)
    model.load_state_dict(family.from_hub(tensors, model), strict=True, assign=True)
    return model.requires_grad_().eval()


def shape_from(config: Any, path: Path) -> Any:
    """The shape that the content of a config.json describes; `path` is for messages."""
    if not isinstance(config, dict):
        raise Refusal(f"{path} is not a mapping: run dvc repro again")
    if config.get("config_sha256", (own := _config_sha256(config))) != own:
        raise Refusal(
            f"{path} is not the file that was saved (SHA-256 differs): run dvc repro again, "
            "or remove config_sha256 from it if you changed it on purpose"
        )
    refuse_foreign(config, path)
    shape = shape_of(config, path)
    check_shape(shape, str(path))
    return shape


def _read_folder(folder: Path, recorded: str | None) -> dict[str, Tensor]:
    """All tensors in float32, in memory of their own."""
    files = weight_files(folder)
    tensors: dict[str, Tensor] = {}
    for path in files.paths:
        tensors |= _read_weights(path, recorded if path.name == WEIGHTS else None)
    if missing := sorted(files.map.keys() - tensors.keys()):
        raise Refusal(f"{folder / files.map[missing[0]]} lacks {missing[0]}, which {INDEX} says it has: copy it again")
    return {name: part for name, part in tensors.items() if not name.endswith(NO_WEIGHT)}


def _settle_head(tensors: dict[str, Tensor], wanted: bool, path: Path) -> None:
    """A file of a tied model has one of the two matrices, or both alike; `wanted`: the family has a head of its own."""
    if EMBEDDING not in tensors:
        return  # named below as missing
    head = tensors.pop(HEAD, tensors[EMBEDDING])
    if not torch.equal(head, tensors[EMBEDDING]):
        raise Refusal(f"{path}: tie_word_embeddings is True, but {HEAD} and {EMBEDDING} differ: set it to false")
    if wanted:
        tensors[HEAD] = tensors[EMBEDDING].clone()


def _read_weights(path: Path, recorded: str | None) -> dict[str, Tensor]:
    try:
        tensors = safetensors.torch.load_file(path)
        for name, part in tensors.items():
            if not part.is_floating_point():
                raise Refusal(f"{path}: {name} is {part.dtype}, expected floating point")
            tensors[name] = part.to(torch.float32, copy=True)  # what is loaded is a view of the file, which may go
    except (safetensors.SafetensorError, ValueError, OSError) as error:
        reason = " ".join(str(error).split())[:200]
        raise Refusal(f"{path} is damaged ({reason}): delete it and run dvc repro again") from None
    if recorded is not None and sha256_of(path) != recorded:
        raise Refusal(
            f"{path} is not the file that was saved (SHA-256 differs from {CONFIG}): run dvc repro again, "
            f"or remove weights_sha256 from {CONFIG} if you changed the weights on purpose"
        )
    return tensors


def _refuse_larger_than(tensors: dict[str, Tensor], shape: Any, path: Path) -> None:
    """Before a model is built: one of 10**9 layers would keep the machine busy until it is out of memory."""
    numbers = sum(part.numel() for part in tensors.values())
    for field in fields(shape):
        most = len(tensors) if field.name in ("layers", "experts") else numbers
        value = getattr(shape, field.name)
        if isinstance(value, int) and field.name != "sequence_tokens" and value > most:
            raise Refusal(f"{path}: {field.name} ({value}) is more than {WEIGHTS} can hold")


def _check_weights(tensors: dict[str, Tensor], expected: dict[str, torch.Size], folder: Path, cure: str) -> None:
    files, unmatched = weight_files(folder), f"weights and {CONFIG} do not match: {cure}"
    if missing := sorted(expected.keys() - tensors.keys()):
        raise Refusal(f"{files.paths[0]} lacks {missing[0]} ({len(missing)} missing): {unmatched}")
    if unknown := sorted(tensors.keys() - expected.keys()):
        raise Refusal(f"{files.path_of(unknown[0])} has {unknown[0]} ({len(unknown)} unknown): {unmatched}")
    for name, shape in expected.items():
        path = files.path_of(name)
        if tensors[name].shape != shape:
            raise Refusal(f"{path}: {name} is {list(tensors[name].shape)}, {CONFIG} says {list(shape)}: {cure}")
        if not _is_finite(tensors[name]):
            raise Refusal(f"{path}: {name} holds a non-finite number: {cure}")
