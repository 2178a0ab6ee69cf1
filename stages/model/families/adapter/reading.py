"""A Hugging Face folder as a model of transformers' own class, or one line that says why not.

Only safetensors are read, nothing is unpickled, no code of a folder is run. The names and sizes of all tensors are
compared with what the class wants before a number is read.
"""

from __future__ import annotations

import importlib
import json
import os
import re
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import Tensor, nn

from stages.files.artifacts import Refusal, sha256_of
from stages.files.weight_files import CONFIG, INDEX, WEIGHTS, tensor_shapes, weight_files
from stages.model.families.adapter.shape import AdapterShape, config_of
from stages.settings.model_types import KNOWN

GATE_UP = "experts.gate_up_proj"  # [E, 2F, D], gate rows first; one by one, and gate apart from up, in most files
GROUPED = 8  # widths of which transformers' grouped kernel takes multiples

Header = dict[str, tuple[str, list[int], str]]  # tensor -> dtype, sizes, file


def transformers(where: str) -> ModuleType:
    """The package; `where` names, for the message, what needs it."""
    os.environ.setdefault("HF_HUB_OFFLINE", "1")  # it looks for newer versions of itself otherwise
    try:
        return importlib.import_module("transformers")
    except ImportError:
        raise Refusal(
            f"{where}: its family is read through transformers, which is not installed:"
            " .venv/bin/pip install -c constraints.txt -e '.[huggingface]'"
        ) from None


def hub_config(shape: AdapterShape, where: str = CONFIG) -> Any:
    """transformers' own config object."""
    config = config_of(shape)
    try:
        return transformers(where).AutoConfig.for_model(**config)
    except Refusal:
        raise
    except Exception as error:  # its classes raise whatever a wrong value leads to
        raise Refusal(f"{where}: transformers does not take this config ({_one_line(error)}): restore it") from None


def empty(shape: AdapterShape, where: str = CONFIG) -> nn.Module:
    """A model of transformers' class without memory for its weights; its rotary tables are real."""
    library, config = transformers(where), hub_config(shape, where)
    try:
        with torch.device("meta"):
            model = library.AutoModelForCausalLM.from_config(
                config, dtype=torch.float32, experts_implementation=_experts_implementation(config)
            )
        _make_tables(model)
        model.tie_weights()
    except Exception as error:
        raise Refusal(f"{where}: transformers cannot build this model ({_one_line(error)}): restore it") from None
    return model


def _experts_implementation(config: Any) -> str | None:
    widths = [config.hidden_size, config.intermediate_size, getattr(config, "moe_intermediate_size", None)]
    return "eager" if any(width and width % GROUPED for width in widths) else None


def _make_tables(model: Any) -> None:
    """What a class computes from its config, and keeps in no file: rotary frequencies, the embedding's scale."""
    made = {}
    for name, part in model.named_non_persistent_buffers():
        at, _, own = name.rpartition(".")
        module = made[at] = model.get_submodule(at)
        setattr(module, own, torch.empty_like(part, device="cpu"))
    # the same function draws weights, which are on no device here
    with torch.device("cpu"), torch.random.fork_rng(devices=[]), torch.no_grad():
        for module in made.values():
            model._init_weights(module)


def materialise(model: Any) -> None:
    """Memory for all that stands on the meta device; its content is whatever was there."""
    for name, part in [*model.named_parameters(), *model.named_buffers()]:
        if part.is_meta:
            at, _, own = name.rpartition(".")
            real = torch.empty_like(part, device="cpu")
            setattr(model.get_submodule(at), own, nn.Parameter(real) if isinstance(part, nn.Parameter) else real)
    model.tie_weights()


def on_disk(model: Any, replaced: dict[str, Tensor] | None = None) -> dict[str, Tensor]:
    """The tensors of a model of transformers' by the names that its `save_pretrained` writes; some may be replaced."""
    from transformers.core_model_loading import revert_weight_conversion
    from transformers.modeling_utils import remove_tied_weights_from_state_dict

    state = remove_tied_weights_from_state_dict(model.state_dict(), model)
    return revert_weight_conversion(model, state | (replaced or {}))


@torch.no_grad()
def homes(model: Any) -> dict[str, Tensor]:
    """Where in the memory of a model each tensor of a file goes: views, by the names of `on_disk`.

    That would copy the halves of stacked experts: numbers take their place there, and name the views afterwards.
    """
    halves: list[Tensor] = []
    numbers, stacks = {}, {}
    for name, stack in model.state_dict().items():
        if name.endswith(GATE_UP):
            stacks[len(halves)] = stack
            numbers[name] = torch.arange(2.0 * len(stack)).view(-1, 2, 1) + len(halves)
            halves += [half for matrix in stack for half in matrix.chunk(2)]
    found = {}
    for name, part in on_disk(model, numbers).items():
        if "experts" in name and part.numel() == 1:  # a half of one expert
            found[name] = halves[int(part.item())]
        elif part.shape[1:] == (2, 1):  # a family that stacks its experts on disk too
            found[name] = stacks[int(part[0, 0].item())]
        else:
            found[name] = part
    return found


@torch.no_grad()
def read(folder: Path, shape: AdapterShape, recorded_sha256: str | None) -> nn.Module:
    """The model of a folder in float32; `recorded_sha256` is of its weights, where we wrote them.

    Tensor by tensor into the model's own memory, which is all that it takes.
    """
    import safetensors  # late: benchmarks run where it is missing

    model_type = json.loads(shape.config_json)["model_type"]
    transformers(f"{folder / CONFIG}: model_type {model_type!r}")
    header = headers(folder)
    _refuse_larger_than(header, shape, folder / CONFIG)
    model = empty(shape, str(folder / CONFIG))
    _check(header, model, folder)
    if recorded_sha256 is not None and sha256_of(folder / WEIGHTS) != recorded_sha256:
        raise Refusal(
            f"{folder / WEIGHTS} is not the file that was saved (SHA-256 differs from {CONFIG}): run dvc repro again,"
            f" or remove weights_sha256 from {CONFIG} if you changed the weights on purpose"
        )
    materialise(model)
    places = homes(model)
    for path in weight_files(folder).paths:
        with safetensors.safe_open(path, "pt") as file:
            for name in sorted(places.keys() & set(file.keys())):
                part = places[name].copy_(file.get_tensor(name))
                if not torch.isfinite(part).all():
                    raise Refusal(f"{path}: {name} holds a non-finite number: copy the folder again")
    return model


def headers(folder: Path) -> Header:
    """Names, sizes and dtypes of all tensors, from the beginnings of the files."""
    import safetensors  # late: benchmarks run where it is missing

    files = weight_files(folder)
    found: Header = {}
    for path in files.paths:
        shapes = tensor_shapes(path)
        try:
            with safetensors.safe_open(path, "pt") as file:
                found |= {name: (file.get_slice(name).get_dtype(), sizes, path.name) for name, sizes in shapes.items()}
        except (safetensors.SafetensorError, OSError) as error:
            raise Refusal(f"{path} is damaged ({_one_line(error)}): copy it again") from None
    if missing := sorted(files.map.keys() - found.keys()):
        raise Refusal(f"{folder / files.map[missing[0]]} lacks {missing[0]}, which {INDEX} says it has: copy it again")
    return found


def _refuse_larger_than(header: Header, shape: AdapterShape, path: Path) -> None:
    """Before a model is built: one of 10**9 layers would keep the machine busy until it is out of memory."""
    numbers = sum(int(torch.Size(sizes).numel()) for _, sizes, _ in header.values())
    for name, value in config_of(shape).items():
        most = len(header) if name == "num_hidden_layers" or "experts" in name else numbers
        if isinstance(value, int) and name.startswith(("num_", "n_", "hidden_size", "intermediate", "vocab_size")):
            if value > most:
                raise Refusal(f"{path}: {name} ({value}) is more than the weights of the folder can hold")


def _check(header: Header, model: Any, folder: Path) -> None:
    """Every tensor that the class wants is there, of its size, and nothing else is."""
    wanted = {name: list(part.shape) for name, part in on_disk(model).items()}
    where = header[next(iter(header))][2] if header else WEIGHTS
    if missing := sorted(wanted.keys() - header.keys()):
        raise Refusal(f"{folder / where} lacks {missing[0]} ({len(missing)} missing): weights and {CONFIG} do not"
                      " match; copy the folder again")  # fmt: skip
    ignored = [*(model._keys_to_ignore_on_load_unexpected or ()), r"rotary_emb\.inv_freq$", r"^lm_head\.weight$"]
    unknown = [name for name in sorted(header.keys() - wanted.keys()) if not any(re.search(p, name) for p in ignored)]
    if unknown:
        raise Refusal(f"{folder / header[unknown[0]][2]} has {unknown[0]} ({len(unknown)} unknown), which a"
                      f" {KNOWN[model.config.model_type]} of this {CONFIG} has not: restore the two")  # fmt: skip
    for name, sizes in wanted.items():
        dtype, given, file = header[name]
        if given != sizes:
            raise Refusal(f"{folder / file}: {name} is {given}, {CONFIG} says {sizes}: restore the two")
        if dtype not in ("F64", "F32", "F16", "BF16"):
            raise Refusal(f"{folder / file}: {name} is {dtype}, only floating-point weights are read: save it"
                          " dequantised")  # fmt: skip


def _one_line(error: Exception) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"
