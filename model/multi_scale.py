"""Multi-scale and flip inference, shared by the methods."""

from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

Maps = tuple[Tensor, ...]

PIXELS_AT_ONCE = 1 << 19   # of the images that go through the network together


def resize(x: Tensor, size: Sequence[int]) -> Tensor:
    """Bilinear, align_corners False; (B, C, H, W) -> (B, C, *size)."""
    if tuple(x.shape[-2:]) == tuple(size):
        return x
    return F.interpolate(x, tuple(size), mode="bilinear", align_corners=False)


def full_precision(x: Tensor) -> Tensor:
    """x in fp32 where autocast made it bf16 or half; fp64 stays."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


def with_flip(images: Tensor, flip: bool) -> Tensor:
    """(B, 3, H, W) -> (2B, 3, H, W), images then their mirrors; unchanged without `flip`."""
    return torch.cat([images, images.flip(-1)]) if flip else images


def merge_flip(maps: Tensor, flip: bool, merge: Callable[[Tensor, Tensor], Tensor]) -> Tensor:
    """Undoes `with_flip`: (2B, C, H, W) -> (B, C, H, W), `merge` of the maps and the mirrored-back maps."""
    if not flip:
        return maps
    straight, mirrored = maps.chunk(2)
    return merge(straight, mirrored.flip(-1))


def scaled(images: Tensor, scale: float) -> Tensor:
    """images at (int(scale * H), int(scale * W))."""
    return resize(images, (int(scale * images.shape[-2]), int(scale * images.shape[-1])))


def min_max(maps: Tensor) -> Tensor:
    """Every map of (B, K, H, W) to [0, 1]: minus its minimum, over its range + 1e-5."""
    maps = maps - maps.amin((-2, -1), keepdim=True)
    return maps / (maps.amax((-2, -1), keepdim=True) + 1e-5)


def localization_maps(
    images: Tensor,
    coarse_maps: Callable[[Tensor], Maps],
    scales: Sequence[float],
    flip: bool,
    relu: bool,
    known: Maps | None = None,
) -> Maps:
    """Maps (B, K, H, W) in [0, 1], summed over scales with the larger of image and flip at each.

    coarse_maps: images -> one or several maps (B, K, h, w). Scale 1 is always there, first and once.
    relu: drop what is negative at each scale (CAM); without it the raw maps are summed (LAM).
    known: coarse_maps(images) where the caller has them already.
    """
    size = images.shape[-2:]
    total: list[Tensor] = []
    for scale in [1.0, *(s for s in scales if s != 1.0)]:
        if scale == 1 and known is not None:
            mirrored = [in_parts(coarse_maps, images.flip(-1))] if flip else []
            coarse = tuple(torch.cat(parts) for parts in zip(known, *mirrored, strict=True))
        else:
            coarse = in_parts(coarse_maps, with_flip(scaled(images, scale), flip))
        for index, raw in enumerate(coarse):
            maps = merge_flip(resize(full_precision(raw), size), flip, torch.maximum)
            maps = maps.relu() if relu else maps
            if index < len(total):
                total[index] = total[index] + maps
            else:
                total.append(maps)
    return tuple(min_max(m) for m in total)


def in_parts(function: Callable[[Tensor], Maps], images: Tensor) -> Maps:
    """function(images); on a CPU of a few images at a time, which is as fast and takes less memory."""
    count = max(1, PIXELS_AT_ONCE // images[0, 0].numel()) if images.device.type == "cpu" else len(images)
    if count >= len(images):
        return function(images)
    parts = [function(part) for part in images.split(count)]
    return tuple(torch.cat(maps) for maps in zip(*parts, strict=True))


def segmentation_logits(
    images: Tensor, logits: Callable[[Tensor], Tensor], scales: Sequence[float], flip: bool, out_size: Sequence[int]
) -> Tensor:
    """Logits (B, K+1, *out_size): sum over image and flip, maximum over scales."""
    fused = None
    for scale in scales:
        maps = resize(full_precision(logits(with_flip(scaled(images, scale), flip))), out_size)
        maps = merge_flip(maps, flip, torch.add)
        fused = maps if fused is None else torch.maximum(fused, maps)
    return fused
