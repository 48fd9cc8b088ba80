"""The MLP of a transformer block, with less memory between forward and backward."""

import torch
import torch.nn.functional as F
from timm.layers import Mlp
from torch import Tensor, nn
from torch.autograd.function import once_differentiable


class RecomputingMlp(nn.Module):
    """fc2(gelu(fc1(x))). In training the backward computes the GELU again instead of keeping it: a quarter of what a
    block keeps.

    Its parameters have the names of timm's Mlp; results and gradients are the same.
    """

    def __init__(self, fc1: nn.Linear, fc2: nn.Linear) -> None:
        super().__init__()
        self.fc1, self.fc2 = fc1, fc2

    @staticmethod
    def fits(mlp: nn.Module) -> bool:
        """Whether `mlp` is of timm's plain form: exact GELU, no norm, no dropout."""
        return (
            type(mlp) is Mlp and isinstance(mlp.act, nn.GELU) and mlp.act.approximate == "none"
            and isinstance(mlp.norm, nn.Identity) and isinstance(mlp.fc1, nn.Linear)
            and mlp.drop1.p == mlp.drop2.p == 0
        )

    def forward(self, x: Tensor) -> Tensor:
        if not self.training:
            return self.fc2(F.gelu(self.fc1(x)))
        return _GeluLinear.apply(self.fc1(x), self.fc2.weight, self.fc2.bias)


class _GeluLinear(torch.autograd.Function):
    """linear(gelu(x), weight, bias), also under autocast."""

    @staticmethod
    def forward(ctx, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        ctx.save_for_backward(x, weight)
        ctx.has_bias = bias is not None
        return F.linear(F.gelu(x), weight, bias)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad: Tensor):
        x, weight = ctx.saved_tensors
        hidden, rows = F.gelu(x), grad.flatten(0, -2)
        grad_x = torch.ops.aten.gelu_backward(grad @ weight.to(grad.dtype), x)
        grad_weight = rows.t() @ hidden.flatten(0, -2)
        return grad_x, grad_weight, rows.sum(0) if ctx.has_bias else None
