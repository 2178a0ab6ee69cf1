"""The sections `optimizer` and `trainer`: how every model is trained, on what, and by how many ranks."""

from typing import Annotated, Literal

from pydantic import Field

from stages.settings.bounds import Count, Momentum, Positive, Section, Share, Word
from stages.settings.lightning import Batches, Duration, FewSteps

DEEPSPEED = ("deepspeed_stage_2", "deepspeed_stage_3")  # of the words of trainer.strategy
CUDA_ONLY = "Lightning runs DeepSpeed on CUDA devices only: choose fsdp2, which shares the same out on CPUs, too"


class Optimizer(Section):
    name: Literal["muon", "adamw"]
    muon_learning_rate: Positive
    adamw_learning_rate: Positive
    weight_decay: Annotated[float, Field(ge=0, le=100)]
    muon_momentum: Momentum
    adamw_beta1: Momentum
    adamw_beta2: Annotated[float, Field(ge=0, le=0.99999)]
    warmup_share: Share
    decay_share: Share


class Trainer(Section):
    accelerator: Literal["auto", "cpu", "gpu"]
    launcher: Word  # a module of stages/training/launchers
    strategy: Word  # a module of stages/training/strategies
    average_every_steps: Count  # read by the strategy local_sgd
    precision: Literal["auto", "32-true", "bf16-mixed"]
    deterministic: bool
    ranks: Annotated[int, Field(ge=1, le=65536)] | Literal["auto"]
    accumulate_grad_batches: Annotated[int, Field(ge=1, le=65536)]
    gradient_clip_val: Positive | None
    max_time: Duration
    move: bool
    limit_val_batches: Batches
    fast_dev_run: FewSteps
    checkpoint_every_seconds: Annotated[float, Field(ge=0, le=1e9)]
    log_every_steps: Count
    activation_memory_bytes: Count | None  # of each rank; None: no limit
