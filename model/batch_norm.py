"""Batch normalisation: over the samples of all processes, on a CPU as on GPUs; and frozen."""

import torch
import torch.distributed as dist
from torch import Tensor, nn

from model.multi_scale import full_precision


class SyncBatchNorm(nn.BatchNorm2d):
    """`nn.BatchNorm2d` of the samples of all processes together, however many each of them has.

    On GPUs it computes as `nn.SyncBatchNorm` does. It is no subclass of that, which DDP refuses on a CPU.
    """

    process_group = None   # all processes; `nn.SyncBatchNorm.forward` asks for it and for the check
    _check_non_zero_input_channels = nn.SyncBatchNorm._check_non_zero_input_channels

    def forward(self, x: Tensor) -> Tensor:
        if not (self.training and dist.is_initialized() and dist.get_world_size() > 1):
            return super().forward(x)
        return self._on_cpu(x) if x.device.type == "cpu" else nn.SyncBatchNorm.forward(self, x)

    def _on_cpu(self, x: Tensor) -> Tensor:
        self._check_input_dim(x)
        values = full_precision(x)
        own = values.sum((0, 2, 3)).double()
        sums = _Sum.apply(torch.cat([own, own.new_tensor([x.numel() // x.shape[1]])]))
        mean, count = sums[:-1] / sums[-1], sums[-1].detach()
        if count < 2:
            raise ValueError("batch norm in training: one value for each channel over all processes has no variance")
        centred = values - mean.to(values.dtype)[:, None, None]
        variance = _Sum.apply(centred.square().sum((0, 2, 3)).double()) / count
        if self.track_running_stats:
            self.num_batches_tracked += 1
            share = 1 / self.num_batches_tracked.item() if self.momentum is None else self.momentum
            for kept, new in ((self.running_mean, mean), (self.running_var, variance * count / (count - 1))):
                kept.lerp_(new.detach().to(kept.dtype), share)
        scale = (variance + self.eps).rsqrt().to(values.dtype)
        scale, bias = (scale * self.weight, self.bias) if self.affine else (scale, torch.zeros_like(scale))
        return (centred * scale[:, None, None] + bias[:, None, None]).to(x.dtype)


class FrozenBatchNorm(nn.BatchNorm2d):
    """`nn.BatchNorm2d` as in evaluation also in training: statistics, weight and bias stay those it starts from."""

    def __init__(self, *args, **settings) -> None:
        super().__init__(*args, **settings)
        self.requires_grad_(False)
        self.eval()

    def train(self, mode: bool = True) -> "FrozenBatchNorm":
        return super().train(False)


class _Sum(torch.autograd.Function):
    """The sum over all processes, and of its gradients."""

    @staticmethod
    def forward(ctx, x: Tensor) -> Tensor:
        total = x.clone(memory_format=torch.contiguous_format)
        dist.all_reduce(total)
        return total

    @staticmethod
    def backward(ctx, gradient: Tensor) -> Tensor:
        return _Sum.apply(gradient)
