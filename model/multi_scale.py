"""Multi-scale and flip inference, shared by the methods."""

from collections.abc import Callable, Collection, Mapping, Sequence
from functools import partial
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from model.method import MapPlan

PIXELS_AT_ONCE = 1 << 19   # of the images that go through the network together


def resize(x: Tensor, size: Sequence[int], align_corners: bool = False) -> Tensor:
    """Bilinear; (B, C, H, W) -> (B, C, *size)."""
    if tuple(x.shape[-2:]) == tuple(size):
        return x
    return F.interpolate(x, tuple(size), mode="bilinear", align_corners=align_corners)


def full_precision(x: Tensor) -> Tensor:
    """x in fp32 where autocast made it bf16 or half; fp64 stays."""
    return x if x.dtype == torch.float64 else x.float()


def with_flip(images: Tensor, flip: bool) -> Tensor:
    """(B, 3, H, W) -> (2B, 3, H, W), images then their mirrors; unchanged without `flip`."""
    return torch.cat([images, images.flip(-1)]) if flip else images


def merge_flip(maps: Tensor, flip: bool, merge: Callable[[Tensor, Tensor], Tensor]) -> Tensor:
    """Undoes `with_flip`: (2B, C, H, W) -> (B, C, H, W), `merge` of the maps and the mirrored-back maps."""
    if not flip:
        return maps
    straight, mirrored = maps.chunk(2)
    return merge(straight, mirrored.flip(-1))


def min_max(maps: Tensor, eps: float = 1e-5) -> Tensor:
    """Every map of (B, K, H, W) to [0, 1]: minus its minimum, over its range + eps."""
    maps = maps - maps.amin((-2, -1), keepdim=True)
    return maps / (maps.amax((-2, -1), keepdim=True) + eps)


class Fusion(NamedTuple):
    """How the maps of an image's scales and of its mirror become one.

    flip, scales: merge two maps. view: what is done to the map of every view, each: to that of every scale, last: to
    the result. from_base: the scales are made from the input of scale 1 and not from the image, and the result has its
    size. coarse: the maps are fused at the size that the network gives the first of them. by_scale: inputs are sampled
    by the scale itself, not by the quotient of the whole sizes. align_corners: how maps are enlarged.
    """

    flip: Callable[[Tensor, Tensor], Tensor]
    scales: Callable[[Tensor, Tensor], Tensor]
    view: Callable[[Tensor], Tensor] = lambda maps: maps
    each: Callable[[Tensor], Tensor] = lambda maps: maps
    last: Callable[[Tensor], Tensor] = lambda maps: maps
    from_base: bool = False
    coarse: bool = False
    by_scale: bool = False
    align_corners: bool = False


# CAM as released: the larger of image and flip, what is positive of it, summed over scales, to [0, 1]
SUM_OF_POSITIVE = Fusion(torch.maximum, torch.add, each=torch.relu, last=min_max, from_base=True)
SUM = SUM_OF_POSITIVE._replace(each=lambda maps: maps)
# logits: the sum of image and flip, the largest over scales
LARGEST = Fusion(torch.add, torch.maximum)
# scores: the mean probability over image, flip and scales, as its logarithm, which a softmax brings to a sum of 1
MEAN_PROBABILITY = Fusion(
    torch.add, torch.add, view=lambda maps: maps.softmax(1), last=lambda maps: maps.clamp(min=1e-12).log()
)


def fused_maps(
    images: Tensor,
    kinds: Mapping[str, tuple[MapPlan, Fusion]],
    coarse_maps: Callable[[Tensor, Collection[str]], dict[str, Tensor]],
    known: Mapping[str, Tensor] | None = None,
    chosen: Callable[[Tensor], Tensor] = lambda maps: maps,
    at_once: bool = False,
) -> dict[str, Tensor]:
    """Maps (B, C, H, W) of several kinds, at the size of `images`; an input that several kinds need is computed once.

    kinds: for each how it is made and fused; scales are summed in the order in which the kinds first need them.
    coarse_maps: images and kinds -> a map (B, C, h, w) of each. known: coarse maps of scale 1 without flip, where the
    caller has them already. chosen: picks the channels that are wanted of coarse maps, before these are enlarged.
    at_once: whether the images of a scale and their mirrors must be one batch, as for batch statistics.
    """
    own, known = tuple(images.shape[-2:]), known or {}
    # an input, by the size it is made from (None: from the image itself), its own and the scale it is sampled by (None:
    # the quotient of these), and whether it has scale 1 -> who needs it
    views: dict[tuple, list[str]] = {}
    for kind, (plan, fusion) in kinds.items():
        base = plan.input_size(*own)
        for scale in plan.scales:
            size = int(scale * base[0]), int(scale * base[1])
            source = base if fusion.from_base and size != base != own else None
            factor = scale if fusion.by_scale and scale != 1 else None
            views.setdefault((source, size, factor, size == base), []).append(kind)
    total: dict[str, Tensor] = {}
    for (source, size, factor, unscaled), needed in views.items():
        inputs = resize(images, source) if source else images
        inputs = _sampled(inputs, factor) if factor else resize(inputs, size)
        flip = any(kinds[kind][0].flip for kind in needed)
        straight = known if unscaled and set(needed) <= known.keys() else None
        raw = _coarse(inputs, flip, partial(coarse_maps, kinds=needed), straight, at_once)
        for kind in needed:
            plan, fusion = kinds[kind]
            maps = full_precision(chosen(raw[kind] if plan.flip else raw[kind][: len(images)]))
            if not fusion.coarse:
                maps = resize(maps, plan.input_size(*own) if fusion.from_base else own, fusion.align_corners)
            elif kind in total:
                maps = resize(maps, total[kind].shape[-2:])
            maps = fusion.each(merge_flip(fusion.view(maps), plan.flip, fusion.flip))
            total[kind] = fusion.scales(total[kind], maps) if kind in total else maps
    return {kind: resize(fusion.last(total[kind]), own) for kind, (_, fusion) in kinds.items()}


def _sampled(images: Tensor, scale: float) -> Tensor:
    """`resize` to int(scale * size), sampled at steps of 1 / scale."""
    return F.interpolate(images, scale_factor=scale, mode="bilinear", align_corners=False)


def _coarse(
    inputs: Tensor, flip: bool, coarse_maps: Callable[[Tensor], dict[str, Tensor]],
    straight: Mapping[str, Tensor] | None, at_once: bool,
) -> dict[str, Tensor]:
    """The coarse maps of the inputs and, with `flip`, of their mirrors behind them. straight: those of the inputs."""
    run = coarse_maps if at_once else partial(in_parts, coarse_maps)
    if straight is None:
        return run(with_flip(inputs, flip))
    if not flip:
        return dict(straight)
    return {kind: torch.cat([straight[kind], maps]) for kind, maps in run(inputs.flip(-1)).items()}


def with_scale_1(scales: Sequence[float]) -> tuple[float, ...]:
    """The scales that CAMs are summed over: 1 is always one of them, and the first."""
    return (1.0, *(scale for scale in scales if scale != 1.0))


def in_parts(function: Callable[[Tensor], dict[str, Tensor]], images: Tensor) -> dict[str, Tensor]:
    """function(images); on a CPU of a few images at a time, which is as fast and takes less memory."""
    count = max(1, PIXELS_AT_ONCE // images[0, 0].numel()) if images.device.type == "cpu" else len(images)
    if count >= len(images):
        return function(images)
    parts = [function(part) for part in images.split(count)]
    return {kind: torch.cat([part[kind] for part in parts]) for kind in parts[0]}
