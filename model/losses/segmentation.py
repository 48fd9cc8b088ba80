"""Cross entropy of pixels: with background and foreground weighed alike (L_seg in AFA, ToCo and MoRe), and plain."""

import torch
import torch.nn.functional as F
from torch import Tensor

from model.losses.ratio import local_ratio
from utils.images import IGNORE


def pixel_cross_entropy(logits: Tensor, labels: Tensor, ratio=local_ratio) -> Tensor:
    """The mean over the pixels that are not 255; 0 where all are. logits (B, K+1, H, W), labels int64 (B, H, W)."""
    loss = F.cross_entropy(logits, labels, ignore_index=IGNORE, reduction="sum")
    return ratio(loss, (labels != IGNORE).sum().to(loss.dtype).clamp(min=1e-12), eps=0)


def segmentation_loss(logits: Tensor, labels: Tensor, ratio=local_ratio) -> Tensor:
    """logits (B, K+1, H, W), labels int64 (B, H, W) with 255 ignored -> scalar."""
    loss = F.cross_entropy(logits, labels, ignore_index=IGNORE, reduction="none")
    background = labels == 0
    foreground = (labels != IGNORE) & ~background
    parts = background, foreground
    sums, counts = (torch.stack(of) for of in ([(loss * part).sum() for part in parts], [part.sum() for part in parts]))
    return 0.5 * ratio(sums, counts, eps=1e-6).sum()
