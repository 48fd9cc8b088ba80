"""A plain timm vision transformer with one class token per class (MoRe, section 3.1; after MCTformer)."""

from typing import NamedTuple

import timm
import torch
import torch.nn.functional as F
from timm.layers import PatchEmbed
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

from model.backbones.mlp import RecomputingMlp
from model.backbones.start_weights import read_start_weights
from utils.errors import UserError, did_you_mean
from utils.images import MEAN, STD


class ViTFeatures(NamedTuple):
    """class_tokens (B, K, D) and patches (B, D, h, w) after the final norm; aux (B, D, h, w) before it."""

    class_tokens: Tensor
    patches: Tensor
    aux: Tensor


class MultiClassTokenViT(nn.Module):
    """Token order: `[R register tokens | K class tokens | N patch tokens]`.

    name, args: a timm VisionTransformer and its keyword arguments.
    num_classes: K, without background. registers: R.
    aux_block: index of the block whose un-normalised output is the auxiliary map (-3 in MoRe).
    timm_statistics: whether the blocks get images with timm's mean and std for `name`, and not ImageNet's.
    Raises UserError where `name` is not a plain ViT with a class token and a position table, saying why.
    """

    def __init__(
        self, name: str, args: dict, num_classes: int, registers: int = 4, aux_block: int = -3,
        timm_statistics: bool = False,
    ) -> None:
        super().__init__()
        vit = _plain_vit(name, args)
        depth = len(vit.blocks)
        if not -depth <= aux_block < depth:
            raise UserError(f"model.aux_block={aux_block}: {name} has {depth} blocks")
        self.num_classes, self.registers, self.aux_block = num_classes, registers, aux_block % depth
        self.embed_dim, self.grid_size = vit.embed_dim, tuple(vit.patch_embed.grid_size)
        self.patch_size = tuple(vit.patch_embed.patch_size)
        self.patch_embed, self.norm_pre, self.blocks = vit.patch_embed, vit.norm_pre, vit.blocks
        self.register_buffer("statistics", _to_statistics(vit.pretrained_cfg), persistent=False)
        self.timm_statistics = timm_statistics
        self.norm = vit.fc_norm if isinstance(vit.norm, nn.Identity) else vit.norm
        for block in self.blocks:
            if RecomputingMlp.fits(getattr(block, "mlp", None)):
                block.mlp = RecomputingMlp(block.mlp.fc1, block.mlp.fc2)
        self.tokens = nn.Parameter(torch.zeros(1, registers + num_classes, self.embed_dim))
        self.token_pos = nn.Parameter(torch.zeros(1, registers + num_classes, self.embed_dim))
        self.patch_pos = nn.Parameter(torch.zeros(1, self.grid_size[0] * self.grid_size[1], self.embed_dim))
        self.load_start_weights(vit.state_dict())

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

    def positions(self, height: int, width: int) -> Tensor:
        """Position embeddings (1, R + K + h*w, D) for images of this size in pixels.

        The sampling follows the factors (h+0.1)/h0, (w+0.1)/w0 of DINO. As released, images that are not square are
        sampled too where they have as many patches as the table, but for those of exactly this model's size.
        """
        h0, w0 = self.grid_size
        h, w = height // self.patch_size[0], width // self.patch_size[1]
        own = (h0 * self.patch_size[0], w0 * self.patch_size[1])
        patches = self.patch_pos
        if (h, w) != (h0, w0) or (height != width and (height, width) != own):
            table = patches.transpose(1, 2).unflatten(2, (h0, w0))
            factors = ((h + 0.1) / h0, (w + 0.1) / w0)
            table = F.interpolate(table, scale_factor=factors, mode="bicubic", align_corners=False)
            patches = table.flatten(2).transpose(1, 2)
        return torch.cat([self.token_pos, patches], dim=1)

    def forward(self, images: Tensor) -> ViTFeatures:
        """images (B, 3, H, W), normalised; what does not fill a whole patch on the right and below is cut off."""
        if self.timm_statistics:
            gain, shift = self.statistics
            images = images * gain + shift
        x = self.patch_embed.proj(images)
        h, w = x.shape[-2:]
        x = self.patch_embed.norm(x.flatten(2).transpose(1, 2))
        x = torch.cat([self.tokens.expand(len(x), -1, -1), x], dim=1) + self.positions(*images.shape[-2:])
        x = self.norm_pre(x)
        prefix = self.tokens.shape[1]
        for index, block in enumerate(self.blocks):
            x = block(x)
            if index == self.aux_block:
                aux = _as_map(x[:, prefix:], h, w)
        x = self.norm(x)
        return ViTFeatures(x[:, self.registers : prefix], _as_map(x[:, prefix:], h, w), aux)


def _plain_vit(name: str, args: dict) -> VisionTransformer:
    try:
        vit = timm.create_model(name, pretrained=False, num_classes=0, **args)
    except (RuntimeError, TypeError, ValueError, AssertionError) as error:
        known = "" if timm.is_model(name) else did_you_mean(name, timm.list_models())
        reason = (str(error) or "timm cannot build it") + known
        raise UserError(f"model.backbone={name}, model.backbone_args={args}: {reason}") from None
    reason = _not_plain(vit)
    if reason:
        raise UserError(f"model.backbone={name}: not a plain ViT with one class token and a position table: {reason}")
    return vit


def _not_plain(vit: nn.Module) -> str | None:
    """Why a network of timm's cannot be taken, None where it can."""
    if not isinstance(vit, VisionTransformer):
        return f"timm makes it as a {type(vit).__name__}"
    if vit.cls_token is None:
        return "it has no class token"
    if hasattr(vit, "dist_token"):
        return "it has a distillation token"
    if vit.pos_embed is None:
        return "it has no position table"
    if type(vit.patch_embed) is not PatchEmbed:
        return f"its patches come from a {type(vit.patch_embed).__name__}, not from one convolution"
    return None


def _to_statistics(cfg: dict) -> Tensor:
    """(2, 3, 1, 1): the gain and the shift that bring images from ImageNet's mean and std to those of timm's `cfg`."""
    mean, std, own_mean, own_std = map(torch.tensor, (MEAN, STD, cfg["mean"], cfg["std"]))
    return torch.stack([std / own_std, (mean - own_mean) / own_std])[..., None, None]


def _as_map(tokens: Tensor, h: int, w: int) -> Tensor:
    return tokens.transpose(1, 2).unflatten(2, (h, w))
