"""MoRe's maps formulated plainly: what benchmarks/benchmark.py evaluate compares ours with.

Every kind of map, scale and mirror goes through the network by itself. The results are those of `MoRe.maps` but for
rounding; tests take this for an oracle.
"""

from collections.abc import Callable, Mapping

import torch
import torch.nn.functional as F
from torch import Tensor

from model.method import MapPlan
from model.more.method import FUSIONS, MoRe
from model.multi_scale import SUM_OF_POSITIVE

Coarse = Callable[[Tensor], Tensor]   # images -> maps (B, C, h, w)


class PlainMaps(MoRe):
    """MoRe with its maps formulated plainly; it has the same parameters."""

    @torch.no_grad()
    def maps(self, images: Tensor, kinds: Mapping[str, MapPlan], labels: Tensor | None = None) -> dict[str, Tensor]:
        made = {}
        for kind, plan in kinds.items():
            def coarse(inputs: Tensor, kind: str = kind) -> Tensor:
                return self.network.coarse_maps(inputs, [kind])[kind]

            if self.kinds[kind].background:
                made[kind] = plain_segmentation(coarse, images, plan)
            else:
                made[kind] = plain_localization(coarse, images, plan, positive=FUSIONS[kind] == SUM_OF_POSITIVE)
        return made


def plain_localization(coarse: Coarse, images: Tensor, plan: MapPlan, positive: bool = False) -> Tensor:
    """Maps (B, C, H, W) in [0, 1]: the sum over scales of the larger of image and mirror. positive: what is above 0.

    As released, the image becomes a square first, and the scales are made from it.
    """
    square = _resized(images, (plan.side, plan.side)) if plan.side else images
    size, total = square.shape[-2:], 0
    for scale in plan.scales:
        scaled = _resized(square, [int(scale * side) for side in size])
        maps = _resized(coarse(scaled), size)
        if plan.flip:
            maps = torch.maximum(maps, _resized(coarse(scaled.flip(-1)), size).flip(-1))
        total = total + (maps.relu() if positive else maps)
    low, high = total.amin((2, 3), True), total.amax((2, 3), True)
    return _resized((total - low) / (high - low + 1e-5), images.shape[-2:])


def plain_segmentation(coarse: Coarse, images: Tensor, plan: MapPlan) -> Tensor:
    """Logits (B, C, H, W): the largest over scales of the sum of image and mirror. Squares are made from the image."""
    size, found = images.shape[-2:], []
    for scale in plan.scales:
        scaled = _resized(images, [int(scale * side) for side in ((plan.side,) * 2 if plan.side else size)])
        logits = _resized(coarse(scaled), size)
        if plan.flip:
            logits = logits + _resized(coarse(scaled.flip(-1)), size).flip(-1)
        found.append(logits)
    return torch.stack(found).amax(0)


def _resized(x: Tensor, size: list[int] | tuple[int, ...]) -> Tensor:
    return F.interpolate(x, tuple(size), mode="bilinear", align_corners=False)
