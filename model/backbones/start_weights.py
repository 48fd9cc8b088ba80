"""Weights of timm's vision transformers, and of files with their names, taken apart for a ViT with own tokens."""

import math
from typing import NamedTuple

import torch
from torch import Tensor

from utils.errors import UserError

# what only the classifier or the pre-training uses
LEFT_OUT = ("head.", "head_dist.", "pre_logits.", "fc_norm.", "attn_pool.", "mask_token")
RENAMED = {"register_tokens": "reg_token"}  # DINOv2's own name -> timm's
REFUSED = {"dist_token": "the distillation token has no counterpart here; take the model without distillation"}


class StartWeights(NamedTuple):
    """layers: by timm's names. A token's position is zero where the model gives it none. h w: the patch grid."""

    layers: dict[str, Tensor]
    class_token: Tensor      # (1, 1, D)
    class_pos: Tensor        # (1, 1, D)
    registers: Tensor        # (1, r, D), r = 0 for most
    register_pos: Tensor     # (1, r, D)
    patch_pos: Tensor        # (1, D, h, w)


def read_start_weights(
    weights: dict[str, Tensor], layers: dict[str, tuple[int, ...]], dim: int, grid: tuple[int, int]
) -> StartWeights:
    """Takes an image model's weights apart, strictly; classifier heads are left out.

    layers: name -> shape of all but tokens and positions. dim: D. grid: the only one that may not be square.
    A model that pools the patches and then normalises (`fc_norm`) has its norm as the final norm of every token.
    Raises UserError naming the first missing, unexpected or misshaped key, and for what has no counterpart.
    """
    weights = {RENAMED.get(key, key): value for key, value in weights.items()}
    for key in REFUSED.keys() & weights.keys():
        raise UserError(f"start weights: key {key!r}: {REFUSED[key]}")
    if "norm.weight" not in weights:
        weights = {_renamed(key, "fc_norm.", "norm."): value for key, value in weights.items()}
    weights = {key: value for key, value in weights.items() if not key.startswith(LEFT_OUT)}
    registers = weights.pop("reg_token", torch.zeros(1, 0, dim)).float()
    check_keys(weights, {**layers, "cls_token": (1, 1, dim), "pos_embed": None}, "start weights")
    if registers.shape[::2] != (1, dim):
        raise UserError(f"start weights: 'reg_token' has shape {tuple(registers.shape)}, expected (1, r, {dim})")
    of_class, of_registers, of_patches = _split_positions(weights["pos_embed"].float(), registers.shape[1], dim, grid)
    own = {name: weights[name] for name in layers}
    return StartWeights(own, weights["cls_token"].float(), of_class, registers, of_registers, of_patches)


def check_keys(weights: dict[str, Tensor], expected: dict, what: str) -> None:
    """Raises UserError naming the first key of `weights` that is missing, unexpected or of another shape.

    expected: key -> shape, or None where any shape will do.
    """
    missing, extra = [k for k in expected if k not in weights], [k for k in weights if k not in expected]
    if missing:
        raise UserError(f"{what}: key {missing[0]!r} is missing ({len(missing)} missing in all)")
    if extra:
        raise UserError(f"{what}: key {extra[0]!r} is not expected ({len(extra)} unexpected in all)")
    for key, shape in expected.items():
        if shape is not None and tuple(weights[key].shape) != tuple(shape):
            raise UserError(f"{what}: {key!r} has shape {tuple(weights[key].shape)}, expected {tuple(shape)}")


def _split_positions(
    table: Tensor, registers: int, dim: int, grid: tuple[int, int]
) -> tuple[Tensor, Tensor, Tensor]:
    """A table (1, n, D) as positions of the class token, the registers and the patches (1, D, h, w).

    n = h*w where tokens have no position (DeiT-III, DINOv2 with registers as timm has it), else the class token's comes
    first, and the registers' behind it where they have one.
    """
    if table.ndim != 3 or table.shape[::2] != (1, dim):
        raise UserError(f"start weights: 'pos_embed' has shape {tuple(table.shape)}, expected (1, n, {dim})")
    count = table.shape[1]
    choices = [(tokens, grid) for tokens in (0, 1, 1 + registers)]   # ours first: 9x16 is as many as 12x12
    choices += [(tokens, (math.isqrt(max(count - tokens, 0)),) * 2) for tokens, _ in choices]
    for tokens, (h, w) in choices:
        if h * w and tokens + h * w == count:
            of_tokens = torch.zeros(1, 1 + registers, dim)
            of_tokens[:, :tokens] = table[:, :tokens]
            return of_tokens[:, :1], of_tokens[:, 1:], table[:, tokens:].transpose(1, 2).unflatten(2, (h, w))
    raise UserError(f"start weights: 'pos_embed' has {count} entries: no square of patches, with or without tokens")


def _renamed(key: str, old: str, new: str) -> str:
    return new + key.removeprefix(old) if key.startswith(old) else key
