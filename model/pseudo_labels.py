"""From localisation maps to pseudo labels, at token and at pixel level. 0 background, 1..K classes, 255 ignored."""

from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from model.multi_scale import resize
from model.par import par_affinity, par_refine
from utils.batch import most_classes
from utils.images import IGNORE, denormalize


class Present(NamedTuple):
    """Of each image M of the K classes: `classes` int64 (B, M); `there`, bool (B, M), whether the image has them."""

    classes: Tensor
    there: Tensor

    def of(self, maps: Tensor) -> Tensor:
        """The maps of these classes: (B, K, h, w), or those of several views behind each other, -> (B, M, h, w)."""
        classes = self.classes.repeat(len(maps) // len(self.classes), 1)
        return maps.gather(1, classes[:, :, None, None].expand(-1, -1, *maps.shape[2:]))


def present_first(labels: Tensor, most: int | None = None) -> Present:
    """Of multi-hot (B, K) the first M classes of each image, present ones first, in the order of their ids.

    most: M, where the caller knows it; None: `most_classes`.
    """
    most = most_classes(labels) if most is None else most
    classes = labels.argsort(dim=1, descending=True, stable=True)[:, :most]
    return Present(classes, labels.gather(1, classes) > 0)


def threshold(maps: Tensor, present: Present, high: float, low: float) -> Tensor:
    """Label map int64 (B, H, W): the strongest present class; values <= high are ignored, values <= low background.

    maps: (B, M, H, W) in [0, 1]. With high == low nothing is ignored.
    """
    value, index = (maps * present.there[:, :, None, None]).max(1)
    label = present.classes.gather(1, index.flatten(1)).view_as(index) + 1
    return label.masked_fill_(value <= high, IGNORE).masked_fill_(value <= low, 0)


def token_labels(maps: Tensor, present: Present, grid: Sequence[int], high: float, low: float) -> Tensor:
    """`threshold` on the patch grid: (B, M, H, W) maps -> int64 (B, *grid)."""
    return threshold(resize(maps, grid), present, high, low)


def valid_tokens(valid: Tensor, patch: Sequence[int]) -> Tensor:
    """bool (B, h, w): patches without a padded pixel. valid: bool (B, H, W); patch: height and width in pixels."""
    h, w = (size // side for size, side in zip(valid.shape[-2:], patch, strict=True))
    inside = valid[:, : h * patch[0], : w * patch[1]]
    return inside.unflatten(1, (h, patch[0])).unflatten(3, (w, patch[1])).all(4).all(2)


def par_images(images: Tensor) -> Tensor:
    """What PAR sees of normalised images, in [0, 1]: as released, truncated to whole grey values."""
    return denormalize(images).clamp(0, 255).floor() / 255


def refined_labels(
    maps: Tensor, present: Present, images: Tensor, high: float, low: float, dilations: Sequence[int], iterations: int
) -> Tensor:
    """PAR-refined pixel labels int64 (B, H, W) (AFA section 3.3, as used by MoRe).

    Two backgrounds compete with the classes: with `high` what wins is foreground, with `low` what loses is
    background; in between is ignored. maps: (B, M, H, W); images: (B, 3, H, W) in [0, 1].
    """
    half = _half(images)
    chosen = resize(maps, half.shape[-2:]).masked_fill(~present.there[:, :, None, None], -torch.inf)
    scores = [F.pad(chosen, (0, 0, 0, 0, 1, 0), value=background).softmax(1) for background in (high, low)]
    return labels_of_refined(torch.cat(scores, 1), present, images, dilations, iterations)


def labels_of_refined(
    scores: Tensor, present: Present, images: Tensor, dilations: Sequence[int], iterations: int
) -> Tensor:
    """Pixel labels int64 (B, H, W) from scores (B, 2 (1 + M), h, w), refined by PAR at half the size of the images.

    scores: of a strong background and the classes, behind them the same of a weak background.
    """
    refined = par_refine(scores, par_affinity(_half(images), dilations), dilations, iterations)
    return labels_of_two_backgrounds(*resize(refined, images.shape[-2:]).chunk(2, 1), present)


def _half(images: Tensor) -> Tensor:
    return resize(images, [max(side // 2, 1) for side in images.shape[-2:]])


def labels_of_two_backgrounds(strict: Tensor, loose: Tensor, present: Present) -> Tensor:
    """Pixel labels int64 (B, H, W) from scores of background and classes, (B, 1 + M, H, W), made twice: in `strict` the
    background is the stronger one, in `loose` the weaker.

    A class that wins in `strict` is the label; 0 where the background wins in both; else 255. Ties are background's.
    """
    absent = ~present.there[:, :, None, None]
    best, label = strict[:, 0], torch.full(strict[:, 0].shape, IGNORE, dtype=torch.int64, device=strict.device)
    for index, value in enumerate(strict[:, 1:].masked_fill(absent, -1).unbind(1)):
        # as argmax over the channels, which is slow where they lie apart
        label = torch.where(value > best, present.classes[:, index, None, None] + 1, label)
        best = torch.maximum(best, value)
    background = loose[:, 0] >= loose[:, 1:].masked_fill(absent, -1).amax(1)
    return label.masked_fill((label == IGNORE) & background, 0)
