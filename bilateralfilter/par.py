"""Pixel-Adaptive Refinement (AFA, CVPR 2022, section 3.3) as torch operators: par_affinity and par_refine.

csrc/ holds them for CPU and GPU. Below they are in plain PyTorch: slow, for machines where nothing can be compiled, and
an oracle in tests. They have no derivatives: a backward through them raises RuntimeError.
"""

from collections.abc import Iterator, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from . import _extension
from .lattice import library

MOST_DILATIONS = 16

library.define("par_affinity(Tensor images, Tensor position, int[] dilations, float colour_width) -> Tensor")
library.define("par_refine(Tensor maps, Tensor affinity, int[] dilations, int iterations) -> Tensor")


@torch.library.register_fake("bilateralfilter::par_affinity")
def _(images: Tensor, position: Tensor, dilations: list[int], colour_width: float) -> Tensor:
    return images.new_empty(images.shape[0], 8 * len(dilations), *images.shape[2:])


@torch.library.register_fake("bilateralfilter::par_refine")
def _(maps: Tensor, affinity: Tensor, dilations: list[int], iterations: int) -> Tensor:
    return maps.new_empty(maps.shape)


def _backward(ctx, grad: Tensor) -> None:
    raise RuntimeError("PAR has no gradient: call it under torch.no_grad(), or detach what it is given")


for _name in ("par_affinity", "par_refine"):
    torch.library.register_autograd(f"bilateralfilter::{_name}", _backward)


def affinity(images: Tensor, position: Tensor, dilations: Sequence[int], colour_width: float) -> Tensor:
    """softmax(-mean over channels of ((neighbour - pixel) / deviation / colour_width)^2) + position.

    images: (B, C, H, W), float32 or float64, other floating types become float32; position: (n,), n = 8 neighbours for
    each dilation, in reading order; the deviation of each channel is that of its n differences. Returns (B, n, H, W).
    Raises ValueError for other shapes and types, and for dilations that are not 1 to 16 positive numbers.
    """
    count = _neighbours_of(dilations)
    if images.ndim != 4 or images.shape[1] == 0 or not images.is_floating_point():
        raise ValueError(f"PAR: images must be floating-point (B, C, H, W), not {images.dtype} {tuple(images.shape)}")
    if position.shape != (count,):
        raise ValueError(f"PAR: {len(dilations)} dilations have {count} positions, not {tuple(position.shape)}")
    _extension.load(images.device.type)
    images = images.to(torch.promote_types(images.dtype, torch.float32))
    return torch.ops.bilateralfilter.par_affinity(images, position.to(images), list(dilations), colour_width)


def refine(maps: Tensor, affinity: Tensor, dilations: Sequence[int], iterations: int) -> Tensor:
    """`iterations` times each value becomes the affinity-weighted sum of its neighbours, where edges repeat.

    maps: (B, C, H, W); affinity: (B, n, H, W) of `affinity`. Returns (B, C, H, W) of the affinity's type.
    Raises ValueError for shapes, types and devices that do not fit.
    """
    count = _neighbours_of(dilations)
    fitting = (maps.shape[0], count, *maps.shape[2:])
    if maps.ndim != 4 or affinity.shape != fitting or not maps.is_floating_point():
        raise ValueError(f"PAR: floating-point maps (B, C, H, W) and affinity (B, {count}, H, W) must fit, not "
                         f"{maps.dtype} {tuple(maps.shape)} and {tuple(affinity.shape)}")
    if affinity.dtype not in (torch.float32, torch.float64) or affinity.device != maps.device or iterations < 0:
        raise ValueError(f"PAR: affinity must be float32 or float64 on {maps.device}, and iterations 0 or more, not "
                         f"{affinity.dtype} on {affinity.device}, {iterations}")
    _extension.load(maps.device.type)
    return torch.ops.bilateralfilter.par_refine(maps.to(affinity.dtype), affinity, list(dilations), iterations)


def _neighbours_of(dilations: Sequence[int]) -> int:
    if not 1 <= len(dilations) <= MOST_DILATIONS or min(dilations) < 1:
        raise ValueError(f"PAR: dilations must be 1 to {MOST_DILATIONS} positive numbers, not {list(dilations)}")
    return 8 * len(dilations)


def par_affinity(images: Tensor, position: Tensor, dilations: Sequence[int], colour_width: float) -> Tensor:
    """See `affinity`."""
    count = len(position)   # the differences are made three times: together they are 48 images
    mean = sum(ring.sum(2) for ring in _differences(images, dilations)) / count
    square = sum((ring - mean.unsqueeze(2)).square_().sum(2) for ring in _differences(images, dilations))
    sharpness = (1 / ((square / (count - 1)).sqrt() + 1e-8) / colour_width).unsqueeze(2)
    colour = [(ring * sharpness).square_().mean(1).neg_() for ring in _differences(images, dilations)]
    return torch.cat(colour, 1).softmax(1).add_(position[:, None, None])


def par_refine(maps: Tensor, affinity: Tensor, dilations: Sequence[int], iterations: int) -> Tensor:
    """See `refine`."""
    maps = maps.clone(memory_format=torch.contiguous_format)
    for _ in range(iterations):
        refined = torch.zeros_like(maps)
        for index, neighbour in enumerate(_neighbours(maps, dilations)):
            refined.addcmul_(neighbour, affinity[:, index : index + 1])
        maps = refined
    return maps


RING = [(dy, dx) for dy in (-1, 0, 1) for dx in (-1, 0, 1) if (dy, dx) != (0, 0)]


def _differences(images: Tensor, dilations: Sequence[int]) -> Iterator[Tensor]:
    """(B, C, 8, H, W) for each dilation: the neighbours minus the pixel itself."""
    for d in dilations:
        yield torch.stack(list(_neighbours(images, (d,))), 2).sub_(images.unsqueeze(2))


def _neighbours(x: Tensor, dilations: Sequence[int]) -> Iterator[Tensor]:
    """The shifted copies of x, edges repeated; 8 for each dilation, in reading order."""
    height, width = x.shape[-2:]
    for d in dilations:
        padded = F.pad(x, (d, d, d, d), mode="replicate")
        for dy, dx in RING:
            top, left = d * (1 + dy), d * (1 + dx)
            yield padded[..., top : top + height, left : left + width]
