"""Pixel-Adaptive Refinement (AFA, CVPR 2022, section 3.3): local affinities of the image smooth a map."""

import functools
from collections.abc import Iterator, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

COLOUR_WIDTH, POSITION_WEIGHT = 0.3, 0.01   # w1 and w2 of the paper


def par_affinity(images: Tensor, dilations: Sequence[int]) -> Tensor:
    """Affinity (B, 8 * len(dilations), H, W) of every pixel with its dilated 3x3 neighbours.

    images: (B, 3, H, W) in [0, 1]. The sum over neighbours is 1 + POSITION_WEIGHT.
    """
    count = len(_RING) * len(dilations)   # the differences are made three times: together they are 48 images
    mean = sum(ring.sum(2) for ring in _differences(images, dilations)) / count
    square = sum((ring - mean.unsqueeze(2)).square_().sum(2) for ring in _differences(images, dilations))
    sharpness = (1 / ((square / (count - 1)).sqrt() + 1e-8) / COLOUR_WIDTH).unsqueeze(2)
    colour = [(ring * sharpness).square_().mean(1).neg_() for ring in _differences(images, dilations)]
    position = _position_weights(tuple(dilations), images.dtype, images.device)
    return torch.cat(colour, 1).softmax(1).add_(position)


@functools.lru_cache(maxsize=8)
def _position_weights(dilations: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
    """What the neighbours' distances add to every affinity, (n, 1, 1); kept, as making it waits for a GPU."""
    distance = torch.tensor([d * (dy * dy + dx * dx) ** 0.5 for d in dilations for dy, dx in _RING])
    position = -(distance / (distance.std() + 1e-8) / COLOUR_WIDTH).square()
    return (POSITION_WEIGHT * position.softmax(0)[:, None, None]).to(device, dtype)


def par_refine(maps: Tensor, affinity: Tensor, dilations: Sequence[int], iterations: int) -> Tensor:
    """`iterations` times each value becomes the affinity-weighted sum of its neighbours.

    maps: (B, C, h, w), first resized to the affinity's size (bilinear, align_corners True).
    affinity: (B, n, H, W) of `par_affinity`. Returns (B, C, H, W).
    """
    maps = F.interpolate(maps, affinity.shape[-2:], mode="bilinear", align_corners=True)
    for _ in range(iterations):
        refined = torch.zeros_like(maps)
        for index, neighbour in enumerate(_neighbours(maps, dilations)):
            refined.addcmul_(neighbour, affinity[:, index : index + 1])
        maps = refined
    return maps


_RING = [(dy, dx) for dy in (-1, 0, 1) for dx in (-1, 0, 1) if (dy, dx) != (0, 0)]


def _differences(images: Tensor, dilations: Sequence[int]) -> Iterator[Tensor]:
    """(B, C, 8, H, W) for each dilation: the neighbours minus the pixel itself."""
    for d in dilations:
        yield torch.stack(list(_neighbours(images, (d,))), 2).sub_(images.unsqueeze(2))


def _neighbours(x: Tensor, dilations: Sequence[int]) -> Iterator[Tensor]:
    """The shifted copies of x, edges repeated; 8 for each dilation, in reading order."""
    height, width = x.shape[-2:]
    for d in dilations:
        padded = F.pad(x, (d, d, d, d), mode="replicate")
        for dy, dx in _RING:
            top, left = d * (1 + dy), d * (1 + dx)
            yield padded[..., top : top + height, left : left + width]
