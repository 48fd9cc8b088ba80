"""All-pairs consistency (ACR, ICCV 2023 workshop): the attention of an image and of its mirror, which should agree."""

from collections.abc import Sequence
from functools import partial

import torch
from torch import Tensor

from model.backbones.attention import OfAttention
from model.backbones.vit import TokenViT


def comparison(vit: TokenViT, images: Tensor) -> OfAttention:
    """`mirror_consistency` for the blocks of a ViT that these images and their mirrors go through."""
    return partial(mirror_consistency, grid=vit.grid_of(*images.shape[-2:]), class_tokens=vit.class_tokens)


def mirror_consistency(maps: Tensor, grid: Sequence[int], class_tokens: slice | None = None) -> Tensor:
    """(2,): the mean difference of one block's attention between two views, class to patch and patch to patch.

    maps: (2B, heads, N, N) after the softmax, of the images and behind them of their mirrors, whose last h*w tokens are
    the patches of `grid`; heads are averaged. The mirrors' patches are mirrored back, as keys and as queries. What
    patches read from other tokens is in neither term. class_tokens: their place; without any the first value is 0.
    """
    count = grid[0] * grid[1]
    mean = maps.sum(1, dtype=torch.float32) / maps.shape[1]   # not mean(1), whose gradient is a tensor for every head
    images, mirrors = mean[:, :, -count:].unflatten(2, grid).chunk(2)   # (B, N, h, w)
    patches, others = (view[:, -count:].unflatten(1, grid) for view in (images, mirrors))
    of_patches = (patches - others.flip((2, 4))).abs().mean()
    if class_tokens is None:
        return torch.stack([torch.zeros_like(of_patches), of_patches])
    return torch.stack([(images[:, class_tokens] - mirrors[:, class_tokens].flip(-1)).abs().mean(), of_patches])
