"""Energy loss, or regularized loss: pixels close in place and colour should get the same class (L_reg in AFA and MoRe).

M. Tang et al.: On Regularized Losses for Weakly-supervised CNN Segmentation, ECCV 2018; the gate is AFA's.
"""

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from bilateralfilter import bilateral_filter
from utils.images import IGNORE, denormalize


def energy_loss(
    logits: Tensor,
    images: Tensor,
    label: Tensor,
    weight: float = 1e-7,
    sigma_rgb: float = 15.0,
    sigma_xy: float = 100.0,
    scale: float = 0.5,
    valid: Tensor | None = None,
    batch_size: int | None = None,
) -> Tensor:
    """Negative agreement of every pixel's class probabilities with those of the pixels like it, computed at `scale`.

    logits: (B, K+1, H, W). images: (B, 3, H, W), normalised. label: (B, H, W), 255 = unlabelled.
    sigma_rgb in grey levels, sigma_xy in pixels of (H, W). valid: bool (B, H, W), False = padding, which takes no part:
    the loss is that of the image without it and its gradient is 0; None: all is image. batch_size: what the sum over
    images is divided by; None: B. Returns an fp32 scalar <= 0, whatever autocast says; logits that are not finite make
    it NaN.
    Raises ValueError for sizes that do not fit, and for images that are not finite (on a GPU: NaN).
    """
    size = logits.shape[-2:]
    for name, tensor in (("images", images), ("label", label), ("valid", valid)):
        if tensor is not None and (len(tensor) != len(logits) or tensor.shape[-2:] != size):
            raise ValueError(f"energy_loss: {name} {tuple(tensor.shape)} do not fit the logits {tuple(logits.shape)}")
    with torch.autocast(logits.device.type, enabled=False):
        prob = _resize(logits.float().softmax(dim=1), scale, "bilinear")
        unlabelled = _resize(label[:, None].float(), scale, "nearest") == IGNORE
        pixels = _resize(denormalize(images.float()), scale, "nearest")
        read = None if valid is None else _wholly_valid(valid, scale)
        value = _Agreement.apply(prob, pixels, unlabelled, read, sigma_rgb, sigma_xy * scale)
        return -weight * value / (batch_size or len(logits))


class _Agreement(torch.autograd.Function):
    """Sum over pixels p and classes k of S[k, p] * A[k, p], with A = gate * (S filtered) and the gradient 2 A.

    2 A would be the derivative if the filter were symmetric and the gate constant: Tang et al. and AFA define it so.
    gate = 1 - max_k S[k, p], at least 0: sure pixels need no regularisation; 1 where unlabelled.
    """

    @staticmethod
    def forward(
        ctx, prob: Tensor, images: Tensor, unlabelled: Tensor, valid: Tensor | None, sigma_rgb: float, sigma_xy: float
    ) -> Tensor:
        gate = (1 - prob.amax(dim=1, keepdim=True)).clamp(min=0).masked_fill(unlabelled, 1)
        agreement = bilateral_filter(images, prob, sigma_rgb, sigma_xy, valid) * gate
        ctx.save_for_backward(agreement)
        return (prob * agreement).sum()

    @staticmethod
    @once_differentiable
    def backward(ctx, grad: Tensor):
        (agreement,) = ctx.saved_tensors
        return 2 * grad * agreement, None, None, None, None, None


def _resize(x: Tensor, scale: float, mode: str) -> Tensor:
    align = {"align_corners": False} if mode == "bilinear" else {}
    return F.interpolate(x, [max(int(side * scale), 1) for side in x.shape[-2:]], mode=mode, **align)


def _wholly_valid(valid: Tensor, scale: float) -> Tensor:
    """valid (B, H, W) -> bool (B, h, w): True where the resized probabilities and image read no padding at all."""
    padding = (~valid[:, None]).float()
    read = _resize(padding, scale, "bilinear") + _resize(padding, scale, "nearest")
    return (read == 0)[:, 0]
