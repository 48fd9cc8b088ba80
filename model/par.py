"""Pixel-Adaptive Refinement (AFA, CVPR 2022, section 3.3): local affinities of the image smooth a map."""

import functools
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from bilateralfilter import par

COLOUR_WIDTH, POSITION_WEIGHT = 0.3, 0.01   # w1 and w2 of the paper


def par_affinity(images: Tensor, dilations: Sequence[int]) -> Tensor:
    """Affinity (B, 8 * len(dilations), H, W) of every pixel with its dilated 3x3 neighbours.

    images: (B, 3, H, W) in [0, 1]. The sum over neighbours is 1 + POSITION_WEIGHT. No gradient flows through it.
    Raises ValueError for other shapes, and for dilations that are not 1 to 16 positive numbers.
    """
    return par.affinity(images, _position_weights(tuple(dilations), images.device), dilations, COLOUR_WIDTH)


@functools.lru_cache(maxsize=8)
def _position_weights(dilations: tuple[int, ...], device: torch.device) -> Tensor:
    """What the neighbours' distances add to every affinity, (n,); kept, as making it waits for a GPU."""
    distance = torch.tensor([d * (dy * dy + dx * dx) ** 0.5 for d in dilations for dy, dx in par.RING])
    position = -(distance / (distance.std() + 1e-8) / COLOUR_WIDTH).square()
    return (POSITION_WEIGHT * position.softmax(0)).to(device)


def par_refine(maps: Tensor, affinity: Tensor, dilations: Sequence[int], iterations: int) -> Tensor:
    """`iterations` times each value becomes the affinity-weighted sum of its neighbours.

    maps: (B, C, h, w), first resized to the affinity's size (bilinear, align_corners True).
    affinity: (B, n, H, W) of `par_affinity`. Returns (B, C, H, W). No gradient flows through it.
    Raises ValueError for shapes that do not fit.
    """
    if maps.ndim == affinity.ndim == 4 and maps.shape[-2:] != affinity.shape[-2:]:
        maps = F.interpolate(maps, affinity.shape[-2:], mode="bilinear", align_corners=True)
    return par.refine(maps, affinity, dilations, iterations)
