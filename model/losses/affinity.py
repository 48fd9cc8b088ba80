"""Patch token contrast (ToCo, CVPR 2023, section 3.2; L_ptc in MoRe): only patches of one class look alike."""

import torch
import torch.nn.functional as F
from torch import Tensor

from model.losses.ratio import local_ratio
from utils.images import IGNORE


def pair_labels(labels: Tensor) -> tuple[Tensor, Tensor]:
    """Token labels (B, N) -> (same, different), bool (B, N, N); neither has pairs with an ignored token or itself."""
    known = labels != IGNORE
    pairs = known[:, :, None] & known[:, None, :]
    pairs &= ~torch.eye(labels.shape[1], dtype=torch.bool, device=labels.device)
    equal = labels[:, :, None] == labels[:, None, :]
    return pairs & equal, pairs & ~equal


def ptc_loss(patches: Tensor, labels: Tensor, ratio=local_ratio) -> Tensor:
    """patches (B, D, h, w), token labels (B, h, w) with 255 ignored -> scalar in [0, 1]."""
    x = F.normalize(patches.flatten(2), dim=1)
    affinity = (x.transpose(1, 2) @ x).abs()
    same, different = pair_labels(labels.flatten(1))
    pairs = same, different
    sums, counts = (torch.stack(of) for of in ([(affinity * of).sum() for of in pairs], [of.sum() for of in pairs]))
    positive, negative = ratio(sums, counts, eps=1)
    return 0.5 * (1 - positive) + 0.5 * negative
