"""timm's vision transformers with tokens of our own: one class token per class (MoRe, section 3.1; after MCTformer), or
one in all."""

from collections.abc import Sequence
from typing import Any, NamedTuple

import timm
import torch
import torch.nn.functional as F
from timm.layers import HybridEmbed, PatchEmbed
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

from model.backbones.attention import OfAttention, block_and_attention, hands_out
from model.backbones.mlp import RecomputingMlp
from model.backbones.start_weights import read_start_weights
from utils.errors import UserError, did_you_mean
from utils.images import MEAN, STD


class ViTFeatures(NamedTuple):
    """class_tokens (B, K, D) and patches (B, D, h, w) after the final norm; aux (B, D, h, w) before it. attention: what
    was made of every block's, if it was asked for."""

    class_tokens: Tensor
    patches: Tensor
    aux: Tensor
    attention: tuple[Any, ...] = ()


class TokenViT(nn.Module):
    """Token order: `[R register tokens | K class tokens | N patch tokens]`.

    vit: timm's. registers: R. classes: K. timm_statistics: whether the blocks get images with timm's mean and std for
    it, and not ImageNet's.
    """

    def __init__(self, vit: VisionTransformer, classes: int, registers: int, timm_statistics: bool) -> None:
        super().__init__()
        self.registers = registers
        self.class_tokens = slice(registers, registers + classes)
        self.embed_dim, self.grid_size = vit.embed_dim, tuple(vit.patch_embed.grid_size)
        self.patch_embed, self.norm_pre, self.blocks = vit.patch_embed, vit.norm_pre, vit.blocks
        self.register_buffer("statistics", to_statistics(vit.pretrained_cfg), persistent=False)
        self.timm_statistics = timm_statistics
        for block in self.blocks:
            if RecomputingMlp.fits(getattr(block, "mlp", None)):
                block.mlp = RecomputingMlp(block.mlp.fc1, block.mlp.fc2)
        self.tokens = nn.Parameter(torch.zeros(1, registers + classes, self.embed_dim))
        self.token_pos = nn.Parameter(torch.zeros(1, registers + classes, self.embed_dim))
        self.patch_pos = nn.Parameter(torch.zeros(1, self.grid_size[0] * self.grid_size[1], self.embed_dim))

    @torch.no_grad()
    def load_start_weights(self, weights: dict[str, Tensor]) -> None:
        """Starts from an image model's weights, under timm's names (`read_start_weights`).

        The class token and its position are repeated to all class tokens and registers. Registers that the weights
        have are the first of ours; the positions of the others are redrawn from a truncated normal with std 1. Patch
        positions are resized bicubically to this model's grid.
        Raises UserError naming the first missing, unexpected or misshaped key.
        """
        layers = {k: v.shape for k, v in self.state_dict().items() if k not in ("tokens", "token_pos", "patch_pos")}
        start = read_start_weights(weights, layers, self.embed_dim, self.grid_size)
        given = start.registers.shape[1]
        if given > self.registers:
            raise UserError(f"start weights: 'reg_token' holds {given} registers: give model.registers={given} or more")
        self.load_state_dict(start.layers, strict=False)
        self.tokens.copy_(start.class_token.expand_as(self.tokens))
        self.token_pos.copy_(start.class_pos.expand_as(self.token_pos))
        self.tokens[:, :given], self.token_pos[:, :given] = start.registers, start.register_pos
        if given < self.registers:
            nn.init.trunc_normal_(self.token_pos[:, given : self.registers], std=1.0)
        patches = start.patch_pos
        if tuple(patches.shape[-2:]) != self.grid_size:
            patches = F.interpolate(patches, self.grid_size, mode="bicubic", align_corners=False)
        self.patch_pos.copy_(patches.flatten(2).transpose(1, 2))

    def embed(self, images: Tensor) -> tuple[Tensor, tuple[int, int]]:
        """Tokens (B, R + K + h*w, D) that enter the first block, and the grid (h, w). images: (B, 3, H, W), normalised;
        what does not fill a whole patch on the right and below is cut off."""
        if self.timm_statistics:
            gain, shift = self.statistics
            images = images * gain + shift
        x = self.patch_maps(images)
        grid = tuple(x.shape[-2:])
        x = x.flatten(2).transpose(1, 2)
        if isinstance(self.patch_embed, PatchEmbed):
            x = self.patch_embed.norm(x)
        x = torch.cat([self.tokens.expand(len(x), -1, -1), x], dim=1)
        return self.norm_pre(x + self.positions(*images.shape[-2:])), grid

    def grid_of(self, height: int, width: int) -> tuple[int, int]:
        """The patches (h, w) of images of this size in pixels."""
        return height // self.patch_size[0], width // self.patch_size[1]

    def positions(self, height: int, width: int) -> Tensor:
        """Position embeddings (1, R + K + h*w, D) for images of this size in pixels."""
        return torch.cat([self.token_pos, self.patch_positions(height, width)], dim=1)

    def patch_positions(self, height: int, width: int) -> Tensor:
        """Those of the patches, (1, h*w, D)."""
        raise NotImplementedError

    def patch_maps(self, images: Tensor) -> Tensor:
        """Embedded patches (B, D, h, w)."""
        return self.patch_embed.proj(images)

    def refuse_hidden_attention(self, why: str) -> None:
        """Raises UserError where a block's attention cannot be handed out. why: the key that wants it."""
        hidden = next((type(block).__name__ for block in self.blocks if not hands_out(block)), None)
        if hidden:
            raise UserError(f"{why}: the attention of this backbone's blocks ({hidden}) is not of the plain form")


class MultiClassTokenViT(TokenViT):
    """One class token per class.

    name, args: a timm VisionTransformer and its keyword arguments.
    num_classes: K, without background. registers: R.
    aux_block: index of the block whose un-normalised output is the auxiliary map (-3 in MoRe).
    Raises UserError where `name` is not a plain ViT with a class token and a position table, saying why.
    """

    def __init__(
        self, name: str, args: dict, num_classes: int, registers: int = 4, aux_block: int = -3,
        timm_statistics: bool = False,
    ) -> None:
        vit = plain_vit(name, args)
        depth = len(vit.blocks)
        if not -depth <= aux_block < depth:
            raise UserError(f"model.aux_block={aux_block}: {name} has {depth} blocks")
        super().__init__(vit, num_classes, registers, timm_statistics)
        self.num_classes, self.aux_block = num_classes, aux_block % depth
        self.patch_size = tuple(vit.patch_embed.patch_size)
        self.norm = vit.fc_norm if isinstance(vit.norm, nn.Identity) else vit.norm
        self.load_start_weights(vit.state_dict())

    def patch_positions(self, height: int, width: int) -> Tensor:
        """The sampling follows the factors (h+0.1)/h0, (w+0.1)/w0 of DINO. As released, images that are not square are
        sampled too where they have as many patches as the table, but for those of exactly this model's size."""
        (h0, w0), (h, w) = self.grid_size, self.grid_of(height, width)
        own = (h0 * self.patch_size[0], w0 * self.patch_size[1])
        if (h, w) == (h0, w0) and (height == width or (height, width) == own):
            return self.patch_pos
        table = self.patch_pos.transpose(1, 2).unflatten(2, (h0, w0))
        factors = ((h + 0.1) / h0, (w + 0.1) / w0)
        table = F.interpolate(table, scale_factor=factors, mode="bicubic", align_corners=False)
        return table.flatten(2).transpose(1, 2)

    def forward(self, images: Tensor, of_attention: OfAttention | None = None) -> ViTFeatures:
        """images (B, 3, H, W), normalised. of_attention: is given the attention maps of every block."""
        x, grid = self.embed(images)
        prefix, attention = self.tokens.shape[1], []
        for index, block in enumerate(self.blocks):
            x, made = block_and_attention(block, x, of_attention)
            attention.append(made)
            if index == self.aux_block:
                aux = _as_map(x[:, prefix:], grid)
        x = self.norm(x)
        return ViTFeatures(x[:, self.class_tokens], _as_map(x[:, prefix:], grid), aux, tuple(attention))


def plain_vit(name: str, args: dict, hybrid: bool = False) -> VisionTransformer:
    """timm's, without classifier. hybrid: whether its patches may come from a ResNet, see class_token_vit.py.

    Raises UserError for any that is not a plain one with one class token and a position table, saying why.
    """
    try:
        vit = timm.create_model(name, pretrained=False, num_classes=0, **args)
    except (RuntimeError, TypeError, ValueError, AssertionError) as error:
        known = "" if timm.is_model(name) else did_you_mean(name, timm.list_models())
        reason = (str(error) or "timm cannot build it") + known
        raise UserError(f"model.backbone={name}, model.backbone_args={args}: {reason}") from None
    reason = _not_plain(vit, hybrid)
    if reason:
        raise UserError(f"model.backbone={name}: not a plain ViT with one class token and a position table: {reason}")
    return vit


def _not_plain(vit: nn.Module, hybrid: bool) -> str | None:
    """Why a network of timm's cannot be taken, None where it can."""
    if not isinstance(vit, VisionTransformer):
        return f"timm makes it as a {type(vit).__name__}"
    if vit.cls_token is None:
        return "it has no class token"
    if hasattr(vit, "dist_token"):
        return "it has a distillation token"
    if vit.pos_embed is None:
        return "it has no position table"
    if type(vit.patch_embed) is not PatchEmbed and not (hybrid and type(vit.patch_embed) is HybridEmbed):
        return f"its patches come from a {type(vit.patch_embed).__name__}, not from one convolution"
    return None


def to_statistics(cfg: dict) -> Tensor:
    """(2, 3, 1, 1): the gain and the shift that bring images from ImageNet's mean and std to those of timm's `cfg`."""
    mean, std, own_mean, own_std = map(torch.tensor, (MEAN, STD, cfg["mean"], cfg["std"]))
    return torch.stack([std / own_std, (mean - own_mean) / own_std])[..., None, None]


def _as_map(tokens: Tensor, grid: Sequence[int]) -> Tensor:
    return tokens.transpose(1, 2).unflatten(2, grid)
