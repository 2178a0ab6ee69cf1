"""What training would run on here: accelerator, ranks, threads, precision. Its bytes depend on it."""

from types import SimpleNamespace

import torch

from stages.files.artifacts import Refusal
from stages.model.layers import can_compile, has_bfloat16
from stages.run.provenance import cores, device_conditions


def conditions(trainer: dict) -> dict:
    """The conditions of training on this machine, for the section `trainer` of the settings.

    A Refusal where the machine lacks what the settings ask for.
    """
    asked = SimpleNamespace(**trainer)
    accelerator, ranks = rank_count(asked.accelerator, asked.ranks)
    found = {
        **device_conditions(ranks if accelerator == "gpu" else 0),
        "ranks": ranks,
        "threads_per_rank": 1 if accelerator == "gpu" else max(1, cores() // ranks),
        "precision": chosen_precision(asked.precision, accelerator),
        "deterministic": asked.deterministic,
    }
    return found | ({"compiled": can_compile()} if accelerator == "gpu" else {})


def rank_count(accelerator: str, ranks: int | str) -> tuple[str, int]:
    """The accelerator to use and how many ranks: two gloo processes on CPU, one rank per GPU over NCCL."""
    if accelerator == "auto":
        accelerator = "gpu" if torch.cuda.is_available() else "cpu"
    if accelerator == "gpu" and not torch.cuda.is_available():
        raise Refusal("trainer.accelerator = gpu: this machine shows no CUDA device; use cpu or auto")
    if ranks == "auto":
        ranks = torch.cuda.device_count() if accelerator == "gpu" else 2
    if accelerator == "gpu" and int(ranks) > torch.cuda.device_count():
        raise Refusal(f"trainer.ranks = {ranks}: this machine has {torch.cuda.device_count()} GPUs")
    return accelerator, int(ranks)


def chosen_precision(precision: str, accelerator: str) -> str:
    """As Lightning names it; auto: bfloat16 autocast where the matrix units have it: detected, not assumed."""
    if precision == "auto":
        precision = "bf16-mixed" if has_bfloat16("cuda" if accelerator == "gpu" else "cpu") else "32-true"
    return precision
