"""What training would run on here: accelerator, ranks, threads, precision. Its bytes depend on it."""

from types import SimpleNamespace

import torch

from stages.engines.plan import rank_count
from stages.files.artifacts import Refusal
from stages.model.layers import can_compile, has_bfloat16
from stages.run.provenance import cores, device_conditions
from stages.settings.trainer import CUDA_ONLY, DEEPSPEED


def conditions(trainer: dict, nodes: int = 1, ranks_per_node: int | None = None) -> dict:
    """The conditions of training on this machine, or on so many like it, for the section `trainer` of the settings.

    A Refusal where the machine lacks what the settings ask for.
    """
    asked = SimpleNamespace(**trainer)
    accelerator = chosen_accelerator(asked.accelerator)
    gpus = torch.cuda.device_count() if accelerator == "gpu" else 0
    if asked.strategy in DEEPSPEED and accelerator != "gpu":
        raise Refusal(f"trainer.strategy = {asked.strategy}: no CUDA device is here, and {CUDA_ONLY}")
    ranks = rank_count(asked.ranks, nodes, ranks_per_node, gpus)
    here = ranks // nodes
    if accelerator == "gpu" and here > gpus:
        number = f"trainer.ranks = {asked.ranks}" if nodes == 1 else f"{here} ranks on each of {nodes} nodes"
        raise Refusal(f"{number}: this machine has {gpus} GPUs")
    found = {
        **device_conditions(here if accelerator == "gpu" else 0),
        "ranks": ranks,
        "threads_per_rank": 1 if accelerator == "gpu" else max(1, cores() // here),
        "precision": chosen_precision(asked.precision, accelerator),
        "deterministic": asked.deterministic,
    }
    compiles = accelerator == "gpu" and asked.strategy not in DEEPSPEED
    return found | ({"compiled": can_compile()} if compiles else {})


def chosen_accelerator(accelerator: str) -> str:
    """The accelerator to use, as Lightning names it: GPUs where there are some."""
    if accelerator == "auto":
        accelerator = "gpu" if torch.cuda.is_available() else "cpu"
    if accelerator == "gpu" and not torch.cuda.is_available():
        raise Refusal("trainer.accelerator = gpu: this machine shows no CUDA device; use cpu or auto")
    return accelerator


def chosen_precision(precision: str, accelerator: str) -> str:
    """As Lightning names it; auto: bfloat16 autocast where the matrix units have it: detected, not assumed."""
    if precision == "auto":
        precision = "bf16-mixed" if has_bfloat16("cuda" if accelerator == "gpu" else "cpu") else "32-true"
    return precision
