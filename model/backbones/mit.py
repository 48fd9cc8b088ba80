"""Mix Transformer, the encoder of SegFormer (Xie et al., NeurIPS 2021, section 3.1), with the strides of AFA.

PVT v2 is built of the same blocks, which timm has; what timm's cannot do is hand out a block's attention before the
softmax.
"""

import math
from collections.abc import Collection, Mapping, Sequence
from typing import Any, NamedTuple

import torch.nn.functional as F
from timm.models.pvt_v2 import Block, PyramidVisionTransformerV2
from torch import Tensor, nn

from model.backbones.mit_weights import segformer_names
from model.backbones.start_weights import check_keys
from model.multi_scale import resize
from utils.errors import UserError, did_you_mean

_WIDE = {"embed_dims": (64, 128, 320, 512)}
SIZES = {   # table 6 of the paper
    "mit_b0": {"embed_dims": (32, 64, 160, 256), "depths": (2, 2, 2, 2)},
    "mit_b1": {**_WIDE, "depths": (2, 2, 2, 2)},
    "mit_b2": {**_WIDE, "depths": (3, 4, 6, 3)},
    "mit_b3": {**_WIDE, "depths": (3, 4, 18, 3)},
    "mit_b4": {**_WIDE, "depths": (3, 8, 27, 3)},
    "mit_b5": {**_WIDE, "depths": (3, 6, 40, 3)},
}
SHARED = {"num_heads": (1, 2, 5, 8), "sr_ratios": (8, 4, 2, 1), "mlp_ratios": (4, 4, 4, 4)}


class RawAttention(NamedTuple):
    """q.k of a block before scale and softmax, as its factors (B, heads, N, d) on the grid (h, w) of the keys."""

    q: Tensor
    k: Tensor
    grid: tuple[int, int]

    def maps(self) -> Tensor:
        """(B, heads, N, N)."""
        return self.q @ self.k.transpose(-2, -1)


class MiTFeatures(NamedTuple):
    """stages: normalised maps (B, C, h, w), large to small. attention: of the blocks that were asked for, in order."""

    stages: tuple[Tensor, ...]
    attention: tuple[RawAttention, ...]


class MixTransformer(nn.Module):
    """Images (B, 3, H, W) -> MiTFeatures; sizes are divided by the strides and rounded up.

    Sides below what the spatial reductions need, `least`, 32 pixels for the paper's strides, are enlarged to it.

    name: mit_b0 to mit_b5. args: what differs from it, out of embed_dims, depths, num_heads, sr_ratios and mlp_ratios,
    a value for each of the four stages. strides: of the stages; the paper's are 4 2 2 2, AFA's 4 2 2 1. drop_path: the
    rate of the last block, which grows from 0 over the blocks.
    Raises UserError for another name or argument.
    """

    def __init__(
        self, name: str, args: Mapping[str, Any], strides: Sequence[int] = (4, 2, 2, 1), drop_path: float = 0.1
    ) -> None:
        super().__init__()
        sizes = _sizes(name, args)
        network = PyramidVisionTransformerV2(num_classes=0, drop_path_rate=drop_path, **sizes)
        self.patch_embed, self.stages = network.patch_embed, network.stages
        self.channels, self.depths, self.heads = sizes["embed_dims"], sizes["depths"], sizes["num_heads"]
        self.sr_ratios = sizes["sr_ratios"]
        self.least = 1
        for index, (embed, stride) in enumerate(zip(self._embeds(), strides, strict=True)):
            embed.proj.stride = (stride, stride)
            self.least = max(self.least, math.prod(strides[: index + 1]) * self.sr_ratios[index])

    def forward(self, images: Tensor, attention: Collection[int] = ()) -> MiTFeatures:
        """attention: the blocks, counted over all stages, whose q.k is wanted; the others run fused."""
        x = resize(images, [max(side, self.least) for side in images.shape[-2:]])
        maps, raw, index = [], [], 0
        for embed, stage in zip(self._embeds(), self.stages, strict=True):
            x = embed(x)
            size = x.shape[1], x.shape[2]
            x = x.flatten(1, 2)
            for block in stage.blocks:
                if index in attention:
                    x, own = _block_and_attention(block, x, size)
                    raw.append(own)
                else:
                    x = block(x, size)
                index += 1
            x = stage.norm(x).transpose(1, 2).unflatten(2, size)
            maps.append(x)
        return MiTFeatures(tuple(maps), tuple(raw))

    def load_start_weights(self, weights: dict[str, Tensor]) -> None:
        """Starts from an image classifier's weights, strictly, under the names of SegFormer's authors, of Hugging Face
        or of MMSegmentation. Raises UserError naming the first missing, unexpected or misshaped key."""
        weights = segformer_names(weights)
        own = self.state_dict()
        to_own = {official_name(name): name for name in own}
        check_keys(weights, {name: own[to_own[name]].shape for name in to_own}, "start weights")
        self.load_state_dict({to_own[name]: value for name, value in weights.items()})

    def _embeds(self) -> list[nn.Module]:
        return [self.patch_embed, *(stage.downsample for stage in self.stages if stage.downsample is not None)]


def official_name(own: str) -> str:
    """The name that the official SegFormer files have for a tensor of `MixTransformer`, whose names are timm's."""
    name = own.replace(".mlp.dwconv.", ".mlp.dwconv.dwconv.")
    if name.startswith("patch_embed."):
        return name.replace("patch_embed.", "patch_embed1.", 1)
    _, stage, part, rest = name.split(".", 3)
    return f"{dict(downsample='patch_embed', blocks='block', norm='norm')[part]}{int(stage) + 1}.{rest}"


def _sizes(name: str, args: Mapping[str, Any]) -> dict[str, Any]:
    if name not in SIZES:
        raise UserError(f"model.backbone={name}: no Mix Transformer{did_you_mean(name, SIZES)} ({', '.join(SIZES)})")
    known = {**SHARED, **SIZES[name]}
    for key, value in args.items():
        if key not in known:
            raise UserError(f"model.backbone_args.{key}: unknown{did_you_mean(key, known)} ({', '.join(known)})")
        whole = isinstance(value, (list, tuple)) and all(type(number) is int and number > 0 for number in value)
        if not whole or len(value) != 4:
            raise UserError(
                f"model.backbone_args.{key} = {value}: expected four numbers, whole and above 0, one for each stage"
            )
    sizes = {key: tuple(value) for key, value in {**known, **args}.items()}
    for width, heads in zip(sizes["embed_dims"], sizes["num_heads"], strict=True):
        if width % heads:
            raise UserError(f"model.backbone_args: {heads} heads do not divide a width of {width}")
    return sizes


def _block_and_attention(block: Block, x: Tensor, size: tuple[int, int]) -> tuple[Tensor, RawAttention]:
    """What the block makes of tokens (B, N, C), and its q.k. With spatial reduction the grid of the queries is
    average-pooled by its ratio, so that the map is square (AFA, released code)."""
    attn, grid, heads = block.attn, size, block.attn.num_heads
    y = block.norm1(x)
    source = y
    if attn.sr is not None:
        source = attn.sr(y.transpose(1, 2).unflatten(2, size))
        grid = source.shape[2], source.shape[3]
        source = attn.norm(source.flatten(2).transpose(1, 2))
    q = attn.q(y).unflatten(2, (heads, -1)).transpose(1, 2)
    k, v = attn.kv(source).unflatten(2, (2, heads, -1)).permute(2, 0, 3, 1, 4)
    attended = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)
    x = x + block.drop_path1(attn.proj(attended))
    x = x + block.drop_path2(block.mlp(block.norm2(x), size))
    if attn.sr is not None:
        pooled = F.avg_pool2d(q.transpose(2, 3).flatten(1, 2).unflatten(2, size), attn.sr.stride)
        q = pooled.flatten(2).unflatten(1, (heads, -1)).transpose(2, 3)
    return x, RawAttention(q, k, grid)
