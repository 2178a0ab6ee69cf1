"""RMSNorm, x / rms(x) * weight (Zhang and Sennrich 2019), of float32 rows [..., D]."""

import torch
import torch.nn.functional as F
from torch import Tensor

from stages.model.kernels.dispatch import Operation

NORM_EPSILON = 1e-6  # what DeepSeek-V3 and Qwen3 use; DeepSeek's latent norm has it fixed in code
FEW_NUMBERS = 1 << 14  # as in decoding: up to so many an operation of PyTorch takes less time than calling it

rms_norm = Operation("rms_norm")


@rms_norm.kernel(when=lambda x, weight_D, epsilon=0.0: x.is_cuda or x.numel() < FEW_NUMBERS)
def pytorch(x: Tensor, weight_D: Tensor, epsilon: float = NORM_EPSILON) -> Tensor:
    """A fused kernel on a GPU. On CPU a chain of small operations, each a pass over memory."""
    return F.rms_norm(x, weight_D.shape, weight_D, epsilon)


@rms_norm.kernel()
def few_passes(x: Tensor, weight_D: Tensor, epsilon: float = NORM_EPSILON) -> Tensor:
    """On CPU a third of PyTorch's time."""
    return FewPassRMSNorm.apply(x, weight_D, epsilon)


class FewPassRMSNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x: Tensor, weight_D: Tensor, epsilon: float = NORM_EPSILON) -> Tensor:
        mean_square = torch.linalg.vector_norm(x, dim=-1, keepdim=True).square_().div_(x.shape[-1])
        inverse_rms = mean_square.add_(epsilon).rsqrt_()
        ctx.save_for_backward(x, weight_D, inverse_rms)
        return (x * inverse_rms).mul_(weight_D)

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor, Tensor, None]:
        x, weight_D, inverse_rms = ctx.saved_tensors
        normed = x * inverse_rms
        grad_normed = grad * normed
        grad_weight_D = grad_normed.flatten(0, -2).sum(0)
        along = (grad_normed @ weight_D).unsqueeze(-1).div_(x.shape[-1])
        grad_x = (grad * weight_D).addcmul_(normed, along, value=-1).mul_(inverse_rms)
        return grad_x, grad_weight_D, None
