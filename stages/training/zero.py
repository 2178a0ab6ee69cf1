"""DeepSpeed's ZeRO under Lightning: what the strategies `deepspeed_stage_2` and `deepspeed_stage_3` share.

Rajbhandari et al. 2020, "ZeRO: Memory Optimizations Toward Training Trillion Parameter Models" (arXiv 1910.02054). A
rank keeps its part of gradients and moments (stage 2), and of the weights, too (stage 3). DeepSpeed takes model and
optimizer over; `Training.optimizer` stays as it was made: its groups are those of a checkpoint, and it brings the
moments of one.

Weights stay float32, and bfloat16 is autocast's, as under the other strategies: DeepSpeed's own bfloat16 would round
the routers' biases. A distillation's teacher stays whole on each rank. Weights are one flat vector here: AdamW alone.
Lightning runs DeepSpeed on CUDA only; tests/test_deepspeed.py lifts that.
"""

import logging
import math
from typing import Any

import torch
import torch.distributed as dist
from lightning.pytorch.strategies import DeepSpeedStrategy
from torch import Tensor, nn

from stages.files.extras import extra
from stages.training.optimizers import MuonAdamW

MOMENTS = ("exp_avg", "exp_avg_sq")


def configuration(stage: int) -> dict[str, Any]:
    """As DeepSpeed reads it; Lightning adds clipping and accumulation, and `ZeRO.setup` autocast."""
    return {
        "train_micro_batch_size_per_gpu": 1,  # of its own count of throughput, which nobody reads
        "zero_optimization": {"stage": stage},
        "zero_allow_untested_optimizer": True,  # AdamW is elementwise: the parts of a vector are updated as the whole
        "bf16": {"enabled": False},
    }


class ZeRO(DeepSpeedStrategy):
    def __init__(self, stage: int):
        extra("deepspeed", "deepspeed")
        super().__init__(config=configuration(stage), logging_level=logging.ERROR)

    def setup(self, trainer) -> None:
        training = self.lightning_module
        teacher, autocast = training.teacher, self.precision_plugin.precision == "bf16-mixed"
        self.config["torch_autocast"] = {"enabled": autocast, "dtype": "bfloat16"}
        if teacher is not None:  # else it would be shared out, and the next fit of the stage needs it
            del training.teacher
            teacher.to(self.root_device)
        super().setup(trainer)
        restore_moments(self.deepspeed_engine.optimizer, training.optimizer)

    def backward(self, closure_loss: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        autocast = self.config["torch_autocast"]["enabled"]
        with torch.autocast(self.root_device.type, torch.bfloat16, enabled=autocast):  # for gradients written by hand
            return super().backward(closure_loss, *args, **kwargs)

    def optimizer_step(self, *args: Any, **kwargs: Any) -> Any:
        loss = super().optimizer_step(*args, **kwargs)
        engine = self.deepspeed_engine
        norm = engine.get_global_grad_norm()  # None before the last of the batches that are added up
        if engine.optimizer.overflow:  # then it leaves the step out, and the norm is -1, or that of a step before
            norm = math.nan
        if norm is not None:
            self.lightning_module.gradient_norm = torch.as_tensor(norm, dtype=torch.float32, device=self.root_device)
        return loss

    def teardown(self) -> None:
        engine = self.model
        super().teardown()
        if hasattr(engine, "destroy"):
            engine.destroy()


def for_engine(optimizer: MuonAdamW) -> MuonAdamW:
    """One that DeepSpeed may take over: it puts its parts into the groups, and takes no empty ones."""
    return MuonAdamW([dict(group) for group in optimizer.param_groups if group["params"]])


def restore_moments(zero: Any, optimizer: MuonAdamW) -> None:
    """Gives DeepSpeed's optimizer the whole moments that this one has from a checkpoint, or zeros.

    Where moments begin with a step, stage 2 finds those of its first group only (DeepSpeed 0.19.8).
    """
    from deepspeed.utils import safe_get_local_optimizer_state, safe_set_full_optimizer_state

    step = next((state["step"] for state in optimizer.state.values()), torch.zeros(()))
    is_stage_3 = hasattr(zero, "fp32_partitioned_groups_flat")
    for part in parts_of(zero):
        moments = {name: torch.zeros_like(part) for name in MOMENTS}
        zero.optimizer.state[part] = {"step": step.to(part.device, copy=True)} | moments
    if not is_stage_3:
        zero._lazy_init_hp_params_optimizer_state()  # what its first step would do
    for parameter, state in optimizer.state.items():
        for name in MOMENTS:
            whole = state[name].to(parameter.device)
            if is_stage_3:  # DeepSpeed's own function takes no parameter that the ranks do not divide
                own = safe_get_local_optimizer_state(parameter, name)
                own.copy_(_part_of(whole, own.numel()).view_as(own))
            else:
                safe_set_full_optimizer_state(parameter, whole, name)
    optimizer.state.clear()


def _part_of(whole: Tensor, numbers: int) -> Tensor:
    """This rank's part, of so many numbers, of a tensor that is filled up with zeros at its end."""
    start, part = dist.get_rank() * numbers, whole.new_zeros(numbers)
    own = whole.flatten()[start : start + numbers]
    part[: len(own)] = own
    return part


def parts_of(zero: Any) -> list[Tensor]:
    """What this rank keeps of the weights, as its optimizer sees them."""
    return getattr(zero, "fp32_partitioned_groups_flat", None) or zero.single_partition_of_fp32_groups


# ---- what a strategy offers (stages/training/strategies/__init__.py)


def shard_model(training: nn.Module) -> None:
    """DeepSpeed shares the model out when it takes it over."""


def whole_state(training, keep: bool) -> tuple[dict, dict]:
    """The states of model and optimizer from the parts of all ranks, a tensor at a time; a collective.

    On CPU where `keep`; elsewhere there is None in the place of tensors.
    """
    from deepspeed.utils import safe_get_full_fp32_param, safe_get_full_optimizer_state

    zero = training.trainer.strategy.deepspeed_engine.optimizer
    weights, groups = training.model.state_dict(), training.optimizer.state_dict()["param_groups"]
    for name, parameter in training.model.named_parameters():
        weights[name] = _kept(safe_get_full_fp32_param(parameter), keep)
    step = zero.optimizer.state[parts_of(zero)[0]]["step"]
    numbered = [parameter for group in training.optimizer.param_groups for parameter in group["params"]]
    states = {
        number: {"step": step.cpu()}
        | {name: _kept(safe_get_full_optimizer_state(parameter, name), keep) for name in MOMENTS}
        for number, parameter in enumerate(numbered)
    }
    trained = [group for group in groups if group["params"]]
    for group, now in zip(trained, zero.optimizer.param_groups, strict=True):
        group["lr"] = now["lr"]
    return weights, {"state": states, "param_groups": groups}


def _kept(tensor: Tensor, keep: bool) -> Tensor | None:
    return tensor.detach().cpu() if keep else None


def validation_nats(training, batches: list[Tensor]) -> Tensor:
    """In the engine's forward pass, where DeepSpeed gathers what is read outside of its module, as the head is."""
    strategy, nats = training.trainer.strategy, torch.zeros((), dtype=torch.float64)
    for batch in batches:
        nats += strategy._forward_redirection(strategy.model, training, "validation_nats", [batch])
    return nats
