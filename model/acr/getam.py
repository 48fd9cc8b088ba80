"""GETAM: class maps from gradients of a class's logit with respect to the attention of the class token (ACR, section 3;
after Sun et al., 2021)."""

from collections.abc import Callable
from typing import NamedTuple

import torch
from timm.models.vision_transformer import Block
from torch import Tensor

from model.acr.network import ACRNetwork
from model.backbones.attention import attention_maps, behind_attention, queries_keys_values


def _grad(gradient: Tensor, row: Tensor) -> Tensor:
    return gradient.relu().mean(-3)


def _cam_grad(gradient: Tensor, row: Tensor) -> Tensor:
    return (gradient * row).relu().mean(-3)


FUNCTIONS: dict[str, Callable[[Tensor, Tensor], Tensor]] = {   # (..., heads, 1, N) -> (..., 1, N)
    "grad": _grad,
    "grad_s": lambda gradient, row: _grad(gradient, row) ** 2,
    "cam_grad": _cam_grad,
    "cam_grad_s": lambda gradient, row: _cam_grad(gradient, row) * _grad(gradient, row),
}


class Localised(NamedTuple):
    """maps: GETAM (B, M, h, w) of the classes asked for. patches: tokens (B, h*w, D) of the last block, if wanted."""

    maps: Tensor
    patches: Tensor | None
    grid: tuple[int, int]


@torch.inference_mode(False)   # where a caller is in it, there would be no gradients
def getam(
    network: ACRNetwork, images: Tensor, classes: Tensor, function: str, start_block: int, affinity: bool,
    patches: bool = False,
) -> Localised:
    """Sums over the blocks from `start_block` on what FUNCTIONS makes of each class's gradient and of the attention.

    classes: int64 (B, M), from 0. affinity: whether the maps are multiplied by the attention between patches, summed
    over all blocks. patches: whether the tokens are wanted, too.
    Only what the class token reads in these blocks is differentiated: the other tokens are constants in the first of
    them, and in the last nobody reads them. One vector-Jacobian product is batched over the M classes.
    Raises ValueError for a network in training mode.
    """
    if network.training:
        raise ValueError("getam: the network must be in evaluation mode")
    vit = network.backbone
    with torch.no_grad():
        x, grid = vit.embed(images)
    count, at = grid[0] * grid[1], vit.registers
    own, rest = x[:, at : at + 1], torch.cat([x[:, :at], x[:, at + 1 :]], 1)
    first, rows, pairs = range(len(vit.blocks))[start_block], [], None
    autocast = torch.is_autocast_enabled(images.device.type)
    for index, block in enumerate(vit.blocks):
        last, differentiated = index == len(vit.blocks) - 1, index >= first
        exact = torch.autocast(images.device.type, enabled=autocast and not differentiated)   # fp32 from there on
        with torch.set_grad_enabled(differentiated), exact:
            step = _step(block, own, rest, leaf=index == first, last=last, wanted=not last or affinity or patches)
        own, rest = step.own, step.rest
        if differentiated:
            rows.append(step.row)
        if affinity:
            of_block = step.maps[:, :, -count:, -count:].mean(1)
            pairs = of_block if pairs is None else pairs.add_(of_block)
    with torch.enable_grad():
        logits = network.logits(own)[:, 0]   # (B, K)
        seeds = torch.zeros_like(logits).expand(classes.shape[1], -1, -1).scatter(2, classes.t()[..., None], 1.0)
        gradients = torch.autograd.grad(logits, rows, seeds, is_grads_batched=True)   # (M, B, heads, 1, N) each
    with torch.no_grad():
        found = sum(FUNCTIONS[function](of_row, row) for of_row, row in zip(gradients, rows, strict=True))
        maps = found[:, :, 0, -count:].transpose(0, 1)   # (B, M, h*w)
        if affinity:
            maps = maps @ pairs.transpose(1, 2)
    return Localised(maps.unflatten(2, grid), rest[:, -count:].detach() if patches else None, grid)


class _Step(NamedTuple):
    """own: the class token (B, 1, D) behind the block. rest: the other tokens. row: what the class token reads, (B,
    heads, 1, N), itself first. maps: what the others read, (B, heads, N - 1, N), without gradient."""

    own: Tensor
    rest: Tensor | None
    row: Tensor
    maps: Tensor | None


def _step(block: Block, own: Tensor, rest: Tensor, leaf: bool, last: bool, wanted: bool) -> _Step:
    """One block. leaf: whether it is the first that is differentiated. wanted: whether the other tokens are."""
    through = torch.is_grad_enabled() and not leaf   # whether what enters the block is differentiated
    with torch.set_grad_enabled(through):
        q, k, v = queries_keys_values(block, own)
        with torch.set_grad_enabled(rest.requires_grad):
            queries, keys, values = queries_keys_values(block, rest)
        k, v = torch.cat([k, keys], 2), torch.cat([v, values], 2)
        row = attention_maps(block, q, k)
    if leaf:
        row.requires_grad_()
    own = behind_attention(block, own, row @ v)
    maps = None
    if wanted:
        with torch.set_grad_enabled(through and not last):
            maps = attention_maps(block, queries, k)
            rest = behind_attention(block, rest, maps @ v)
    return _Step(own, rest, row, None if maps is None else maps.detach())
