"""From localisation maps to pseudo labels, at token and at pixel level. 0 background, 1..K classes, 255 ignored."""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from model.multi_scale import resize
from model.par import par_affinity, par_refine
from utils.images import IGNORE


def threshold(maps: Tensor, labels: Tensor, high: float, low: float) -> Tensor:
    """Label map int64 (B, H, W): the strongest present class; values <= high are ignored, values <= low background.

    maps: (B, K, H, W) in [0, 1]. labels: (B, K) multi-hot. With high == low nothing is ignored.
    """
    value, label = (maps * labels[:, :, None, None]).max(1)
    label = label + 1
    label[value <= high] = IGNORE
    label[value <= low] = 0
    return label


def token_labels(maps: Tensor, labels: Tensor, grid: Sequence[int], high: float, low: float) -> Tensor:
    """`threshold` on the patch grid: (B, K, H, W) maps -> int64 (B, *grid)."""
    return threshold(resize(maps, grid), labels, high, low)


def valid_tokens(valid: Tensor, patch: Sequence[int]) -> Tensor:
    """bool (B, h, w): patches without a padded pixel. valid: bool (B, H, W); patch: height and width in pixels."""
    h, w = (size // side for size, side in zip(valid.shape[-2:], patch, strict=True))
    inside = valid[:, : h * patch[0], : w * patch[1]]
    return inside.unflatten(1, (h, patch[0])).unflatten(3, (w, patch[1])).all(4).all(2)


def refined_labels(
    maps: Tensor, labels: Tensor, images: Tensor, high: float, low: float, dilations: Sequence[int], iterations: int
) -> Tensor:
    """PAR-refined pixel labels int64 (B, H, W) (AFA section 3.3, as used by MoRe).

    Two backgrounds compete with the classes: with `high` what wins is foreground, with `low` what loses is
    background; in between is ignored. maps: (B, K, H, W); images: (B, 3, H, W) in [0, 1].
    """
    size = images.shape[-2:]
    half = (size[0] // 2, size[1] // 2)
    maps = maps * labels[:, :, None, None]
    images, maps = resize(images, half), resize(maps, half)
    count = max(int(labels.sum(1).max()), 1)
    classes = labels.argsort(dim=1, descending=True, stable=True)[:, :count]               # (B, M), present ones first
    present = labels.gather(1, classes)[:, :, None, None] > 0                          # (B, M, 1, 1)
    chosen = maps.gather(1, classes[:, :, None, None].expand(-1, -1, *half)).masked_fill(~present, -torch.inf)
    backgrounds = maps.new_tensor([high, low]).view(1, 2, 1, 1, 1).expand(len(maps), 2, 1, *half)
    scores = torch.cat([backgrounds, chosen.unsqueeze(1).expand(-1, 2, -1, -1, -1)], 2).softmax(2)
    refined = par_refine(scores.flatten(1, 2), par_affinity(images, dilations), dilations, iterations)
    refined = F.interpolate(refined, size, mode="bilinear", align_corners=False).unflatten(1, (2, 1 + count))
    refined[:, :, 1:].masked_fill_(~present.unsqueeze(1), -1)
    ids = torch.cat([torch.zeros_like(classes[:, :1]), classes + 1], 1)                # (B, 1+M)
    winner = refined.argmax(2)                                                         # (B, 2, H, W)
    strict, loose = ids.gather(1, winner.flatten(1)).view_as(winner).unbind(1)
    label = strict.masked_fill(strict == 0, IGNORE)
    return label.masked_fill((strict == 0) & (loose == 0), 0)
