"""ViTs with one class token, plain or behind a ResNet (ACR, released code): the last block's tokens, not normalised."""

from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from timm.layers import HybridEmbed, StdConv2dSame
from timm.layers.padding import pad_same
from timm.models.resnetv2 import ResNetV2
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

from model.backbones.attention import OfAttention, block_and_attention
from model.backbones.vit import TokenViT, plain_vit
from utils.errors import UserError

RESNET = ("resnet_layers", "resnet_width_factor")   # arguments that timm's hybrids lack


class StandardisedConv(StdConv2dSame):
    """Weights (w - mean) / (std + 1e-5) with the population's std, as released; timm divides by sqrt(variance + 1e-8).
    """

    def forward(self, x: Tensor) -> Tensor:
        if self.same_pad:
            x = pad_same(x, self.kernel_size, self.stride, self.dilation)
        std, mean = torch.std_mean(self.weight, (1, 2, 3), correction=0, keepdim=True)
        weight = (self.weight - mean) / (std + 1e-5)
        return F.conv2d(x, weight, self.bias, self.stride, self.padding, self.dilation, self.groups)


class ClassTokenViT(TokenViT):
    """Token order: registers, where timm's model has them, the class token, h*w patches.

    name, args: a plain timm ViT, or one of its hybrids with ResNetV2, such as vit_base_r50_s16_384, and its keyword
    arguments; hybrids take `resnet_layers` and `resnet_width_factor` besides, of their stages.
    Raises UserError for any other network, saying why.
    """

    def __init__(self, name: str, args: Mapping[str, Any], timm_statistics: bool = False) -> None:
        vit = _vit(name, dict(args))
        super().__init__(vit, 1, vit.num_prefix_tokens - 1, timm_statistics)
        self.hybrid = isinstance(vit.patch_embed, HybridEmbed)
        self.patch_size = tuple(vit.patch_embed.feat_ratio(as_scalar=False))
        self.refuse_hidden_attention("method=acr")
        self.load_start_weights(vit.state_dict())

    def load_start_weights(self, weights: dict[str, Tensor]) -> None:
        """As for every TokenViT; the final norm, which is not used, is left out."""
        super().load_start_weights({k: v for k, v in weights.items() if not k.startswith(("norm.", "fc_norm."))})

    def grid_of(self, height: int, width: int) -> tuple[int, int]:
        spare = [size - 1 if self.hybrid else 0 for size in self.patch_size]   # a hybrid pads
        return super().grid_of(height + spare[0], width + spare[1])

    def patch_positions(self, height: int, width: int) -> Tensor:
        """The table is resized bilinearly."""
        grid = self.grid_of(height, width)
        if grid == self.grid_size:
            return self.patch_pos
        table = self.patch_pos.transpose(1, 2).unflatten(2, self.grid_size)
        return F.interpolate(table, grid, mode="bilinear", align_corners=False).flatten(2).transpose(1, 2)

    def patch_maps(self, images: Tensor) -> Tensor:
        return self.patch_embed.proj(self.patch_embed.backbone(images)) if self.hybrid else super().patch_maps(images)

    def forward(self, images: Tensor, of_attention: OfAttention | None = None) -> tuple[Tensor, list[Any]]:
        """Tokens (B, N, D) of the last block, and what `of_attention` makes of the attention of every block.

        images: (B, 3, H, W), normalised. What does not fill a patch is cut off, by a hybrid padded.
        """
        (x, _), made = self.embed(images), []
        for block in self.blocks:
            x, of_block = block_and_attention(block, x, of_attention)
            made.append(of_block)
        return x, made


def _vit(name: str, args: dict[str, Any]) -> VisionTransformer:
    own = {key: args.pop(key) for key in RESNET if key in args}
    vit = plain_vit(name, args, hybrid=True)
    resnet = getattr(vit.patch_embed, "backbone", None)
    if resnet is None and own:
        raise UserError(f"model.backbone_args.{next(iter(own))}: {name} has no ResNet")
    if resnet is not None:
        if type(resnet) is not ResNetV2 or not isinstance(resnet.stem.conv, StdConv2dSame):
            raise UserError(f"model.backbone={name}: its patches come from a {type(resnet).__name__} of another form")
        layers = own.get(RESNET[0], [len(stage.blocks) for stage in resnet.stages])
        vit.patch_embed = HybridEmbed(
            _resnet(layers, own.get(RESNET[1], 1)), vit.patch_embed.img_size, vit.patch_embed.patch_size,
            embed_dim=vit.embed_dim,
        )
    return vit


def _resnet(layers: list[int], width_factor: float) -> nn.Module:
    return ResNetV2(
        layers, num_classes=0, global_pool="", preact=False, stem_type="same", conv_layer=StandardisedConv,
        width_factor=width_factor,
    )
