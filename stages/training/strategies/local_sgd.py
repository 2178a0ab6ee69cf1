"""Local SGD, for machines that a slow link joins: ranks of one machine average their gradients at every step, as with
`ddp`, and machines average what they have become every `trainer.average_every_steps`.

Stich 2019, "Local SGD Converges Fast and Communicates Little" (arXiv 1805.09767); Lin et al. 2020, "Don't Use Large
Mini-Batches, Use Local SGD" (arXiv 1808.07217). Of the weights the change since the last average is sent, in bfloat16
(as in INTELLECT-1 and Streaming DiLoCo, which send fewer bits still), and the optimizer's moments with it: so after an
average all ranks are equal, and the checkpoint of one is that of all. In between a run neither saves nor stops.

On one machine it is `ddp`.
"""

import os

import torch
import torch.distributed as dist
from lightning.pytorch.strategies import DDPStrategy
from torch import Tensor
from torch.distributed.device_mesh import init_device_mesh

from stages.training.optimizers import MuonAdamW


class LocalSGD(DDPStrategy):
    def __init__(self) -> None:
        kind = "cuda" if dist.get_backend() == "nccl" else "cpu"
        ranks, of_machine = dist.get_world_size(), _ranks_of_machine()
        mesh = init_device_mesh(kind, (ranks // of_machine, of_machine), mesh_dim_names=("machine", "rank"))
        self.machines, self.own_machine = mesh.get_group("machine"), mesh.get_group("rank")
        self.agreed: list[Tensor] = []  # the weights after the last average
        super().__init__(process_group=self.own_machine, broadcast_buffers=False, gradient_as_bucket_view=True)

    def setup_optimizers(self, trainer) -> None:
        super().setup_optimizers(trainer)
        for optimizer in self.optimizers:
            assert isinstance(optimizer, MuonAdamW)
            optimizer.equal_ranks = self.own_machine
            self.agreed = [weight.detach().clone() for weight in _weights(optimizer)]

    def optimizer_step(self, optimizer, closure, model=None, **kwargs):
        loss = super().optimizer_step(optimizer, closure, model, **kwargs)
        training = model if model is not None else self.lightning_module
        trainer = training.rank.settings.trainer
        differ = dist.get_world_size(self.machines) > 1
        if differ and ranks_agree(training.progress.step + 1, training.fit.steps, trainer):
            self._average(optimizer)
        return loss

    @torch.no_grad()
    def _average(self, optimizer: MuonAdamW) -> None:
        weights = _weights(optimizer)
        moments = [optimizer.state[weight][name] for weight in weights for name in _moments(optimizer.state[weight])]
        changes = [weight - agreed for weight, agreed in zip(weights, self.agreed, strict=True)]
        means = self._means([*changes, *moments])
        for weight, agreed, mean in zip(weights, self.agreed, means, strict=False):
            weight.copy_(agreed.add_(mean))
        for moment, mean in zip(moments, means[len(weights) :], strict=True):
            moment.copy_(mean)

    def _means(self, values: list[Tensor]) -> list[Tensor]:
        """Over the machines. The ranks of one have the same values: each averages its part of them with its like."""
        ranks, sizes = dist.get_world_size(self.own_machine), [value.numel() for value in values]
        flat = values[0].new_zeros(-(-sum(sizes) // ranks) * ranks, dtype=torch.bfloat16)
        torch.cat([value.flatten().bfloat16() for value in values], out=flat[: sum(sizes)])
        part = flat.chunk(ranks)[dist.get_rank(self.own_machine)].clone()
        dist.all_reduce(part, group=self.machines)
        dist.all_gather_into_tensor(flat, part, group=self.own_machine)
        means = flat[: sum(sizes)].float() / dist.get_world_size(self.machines)
        return [mean.view_as(value) for mean, value in zip(means.split(sizes), values, strict=True)]


def _ranks_of_machine() -> int:
    return int(os.environ.get("LOCAL_WORLD_SIZE", dist.get_world_size()))


def _weights(optimizer: MuonAdamW) -> list[Tensor]:
    return [weight for group in optimizer.param_groups for weight in group["params"]]


def _moments(state: dict[str, Tensor]) -> list[str]:
    return sorted(state.keys() - {"step"})  # the number of steps is the same everywhere


def lightning_strategy() -> LocalSGD:
    return LocalSGD()


def needs_rehearsal(world_size: int) -> bool:
    """As with `ddp`, among the ranks of a machine."""
    return _ranks_of_machine() > 2


def ranks_agree(step: int, steps: int, trainer) -> bool:
    """Are all ranks equal after this step, of so many?"""
    alone = _ranks_of_machine() == dist.get_world_size()
    return alone or step % trainer.average_every_steps == 0 or step == steps
