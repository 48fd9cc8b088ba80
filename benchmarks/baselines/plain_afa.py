"""AFA formulated plainly, as the released code computes it: what its step is compared with.

Attention is not fused; the map before the softmax is made and kept of every block, decoder and affinity also where only
the CAM is asked for. The walk goes class by class, PAR image by image, by convolutions that shift, both once for each
background and at every iteration. Nothing of model/afa computes here: tests take this for an oracle. The parameters
have the released names. There is no drop-path, and no nan where a batch lacks background or foreground.
"""

import functools
from collections import namedtuple
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.baselines.plain_step import plain_par, plain_pixel_labels, plain_segmentation_loss
from model.afa.method import AFA
from model.afa.official import official_name
from model.multi_scale import min_max, resize
from utils.batch import Batch, boxes_of
from utils.images import IGNORE, denormalize

STRIDE = 16   # of the tokens
Box = Sequence[int]   # top, bottom, left, right of the image in its crop; the ends may lie outside
# walk_after: up to this iteration the CAM gives the labels; affinity_follows: then those of the affinity change, too
Settings = namedtuple(
    "Settings", "scales radius high low dilations par_iterations walk_after affinity_follows",
    defaults=((1.0, 0.5, 1.5), 8, 0.55, 0.35, (1, 2, 4, 8, 12, 24), 10, 6000, False),
)


class Block(nn.Module):
    def __init__(self, dim: int, heads: int, ratio: int) -> None:
        super().__init__()
        self.heads, self.ratio, hidden = heads, ratio, 4 * dim
        self.norm1, self.norm2 = nn.LayerNorm(dim, eps=1e-6), nn.LayerNorm(dim, eps=1e-6)
        attention = {"q": nn.Linear(dim, dim), "kv": nn.Linear(dim, 2 * dim), "proj": nn.Linear(dim, dim)}
        if ratio > 1:
            attention |= {"sr": nn.Conv2d(dim, dim, ratio, ratio), "norm": nn.LayerNorm(dim)}
        self.attn = nn.ModuleDict(attention)
        depthwise = nn.ModuleDict({"dwconv": nn.Conv2d(hidden, hidden, 3, 1, 1, groups=hidden)})
        self.mlp = nn.ModuleDict({"fc1": nn.Linear(dim, hidden), "dwconv": depthwise, "fc2": nn.Linear(hidden, dim)})

    def forward(self, x: Tensor, h: int, w: int) -> tuple[Tensor, Tensor]:
        attended, raw = self.attention(self.norm1(x), h, w)
        x = x + attended
        hidden = self.mlp["fc1"](self.norm2(x)).transpose(1, 2).unflatten(2, (h, w))
        hidden = F.gelu(self.mlp["dwconv"]["dwconv"](hidden).flatten(2).transpose(1, 2))
        return x + self.mlp["fc2"](hidden), raw

    def attention(self, x: Tensor, h: int, w: int) -> tuple[Tensor, Tensor]:
        """What attention gives, and q.k (B, heads, n, n) of the n reduced tokens, before the scale and the softmax."""
        layer, queries = self.attn, self.attn["q"](x)
        reduced, pooled = x, queries
        if self.ratio > 1:
            reduced, pooled = (tokens.transpose(1, 2).unflatten(2, (h, w)) for tokens in (x, queries))
            reduced = layer["norm"](layer["sr"](reduced).flatten(2).transpose(1, 2))
            pooled = F.avg_pool2d(pooled, self.ratio).flatten(2).transpose(1, 2)
        parts = (queries, pooled, *layer["kv"](reduced).chunk(2, 2))
        q, small, k, v = (part.unflatten(2, (self.heads, -1)).transpose(1, 2) for part in parts)
        scores = q @ k.transpose(-2, -1)
        raw = small @ k.transpose(-2, -1) if self.ratio > 1 else scores
        weights = (scores * q.shape[-1] ** -0.5).softmax(-1)
        return layer["proj"]((weights @ v).transpose(1, 2).flatten(2)), raw


class PlainNetwork(nn.Module):
    """num_classes: with the background. Arguments as in the `cfg_*` entries of the goldens."""

    def __init__(
        self, embed_dims: Sequence[int], depths: Sequence[int], num_heads: Sequence[int], sr_ratios: Sequence[int],
        stride: Sequence[int], embedding_dim: int, num_classes: int, dropout: float = 0.0,
    ) -> None:
        super().__init__()
        self.encoder, self.decoder, width, inputs = nn.ModuleDict(), nn.ModuleDict(), embedding_dim, 3
        for i, dim in enumerate(embed_dims):
            convolution = nn.Conv2d(inputs, dim, 3 if i else 7, stride[i], 1 if i else 3)
            blocks = nn.ModuleList(Block(dim, num_heads[i], sr_ratios[i]) for _ in range(depths[i]))
            embed = nn.ModuleDict({"proj": convolution, "norm": nn.LayerNorm(dim)})
            stage = {"patch_embed": embed, "block": blocks, "norm": nn.LayerNorm(dim, eps=1e-6)}
            self.encoder.update({f"{name}{i + 1}": module for name, module in stage.items()})
            self.decoder[f"linear_c{i + 1}"] = nn.ModuleDict({"proj": nn.Linear(dim, width)})
            inputs = dim
        fuse = {"conv": nn.Conv2d(len(embed_dims) * width, width, 1, bias=False), "bn": nn.BatchNorm2d(width)}
        self.decoder.update({"linear_fuse": nn.ModuleDict(fuse), "linear_pred": nn.Conv2d(width, num_classes, 1)})
        self.dropout, self.attn_proj = nn.Dropout2d(dropout), nn.Conv2d(2 * num_heads[-1], 1, 1)
        self.classifier = nn.Conv2d(embed_dims[-1], num_classes - 1, 1, bias=False)

    def forward(self, images: Tensor, cam_only: bool = False) -> tuple:
        """Class logits, segmentation logits, raw attentions, predicted affinity; cam_only: CAM and affinity."""
        features, maps = self.encode(images)
        logits = self.decode(features)
        pair = torch.cat(maps[-2:], 1)
        affinity = self.attn_proj(pair + pair.transpose(-2, -1)).sigmoid()[:, 0]
        if cam_only:
            return self.classifier(features[-1]).detach(), affinity.detach()
        return self.classifier(F.adaptive_max_pool2d(features[-1], 1)).flatten(1), logits, maps, affinity

    def encode(self, x: Tensor) -> tuple[list[Tensor], list[Tensor]]:
        """The map of every stage (B, C, h, w), and the raw attention of every block."""
        features, maps = [], []
        for i in range(1, len(self.encoder) // 3 + 1):
            embed, blocks, norm = (self.encoder[f"{name}{i}"] for name in ("patch_embed", "block", "norm"))
            x = embed["proj"](x)
            grid, x = x.shape[-2:], embed["norm"](x.flatten(2).transpose(1, 2))
            for block in blocks:
                x, raw = block(x, *grid)
                maps.append(raw)
            x = norm(x).transpose(1, 2).unflatten(2, grid)
            features.append(x)
        return features, maps

    def decode(self, features: Sequence[Tensor]) -> Tensor:
        parts = []
        for i, x in enumerate(features, 1):
            mapped = self.decoder[f"linear_c{i}"]["proj"](x.flatten(2).transpose(1, 2)).transpose(1, 2)
            parts.append(resize(mapped.unflatten(2, x.shape[-2:]), features[0].shape[-2:]))
        fuse = self.decoder["linear_fuse"]
        return self.decoder["linear_pred"](self.dropout(fuse["bn"](fuse["conv"](torch.cat(parts[::-1], 1))).relu()))


@torch.no_grad()
def plain_cams(network: nn.Module, images: Tensor, scales: Sequence[float]) -> tuple[Tensor, Tensor]:
    """CAM (B, K, H, W) in [0, 1] summed over scales; affinity (2B, n, n) of the largest, images then their mirrors."""
    size, cams, affinities = images.shape[-2:], [], []
    for scale in [1.0, *(s for s in scales if s != 1.0)]:
        scaled = resize(images, [int(scale * side) for side in size])
        cam, affinity = network(torch.cat([scaled, scaled.flip(-1)]), cam_only=True)
        straight, mirrored = resize(cam, size).chunk(2)
        cams.append(torch.maximum(straight, mirrored.flip(-1)).relu())
        affinities.append(affinity)
    return min_max(torch.stack(cams).sum(0)), affinities[list(scales).index(max(scales))]


@functools.lru_cache(maxsize=8)
def plain_mask(h: int, w: int, radius: int, device: torch.device | None = None) -> Tensor:
    """bool (h * w, h * w): which tokens are at most `radius` rows and columns apart."""
    y, x = torch.arange(h, device=device).repeat_interleave(w), torch.arange(w, device=device).repeat(h)
    return ((y[:, None] - y).abs() <= radius) & ((x[:, None] - x).abs() <= radius)


def plain_walk(cams: Tensor, affinity: Tensor, mask: Tensor, labels: Tensor, background: float) -> Tensor:
    """One step, cams (B, K, h, w) -> (B, K + 1, h, w), 0 for absent classes. affinity: of B images, or these first."""
    affinity = affinity.clone()
    for matrix in affinity[: len(cams)]:
        matrix[~mask] = 0
    affinity = affinity.pow(2)
    affinity = affinity / (affinity.sum(1, keepdim=True) + 0.1)
    result = cams.new_zeros(len(cams), cams.shape[1] + 1, *cams.shape[2:])
    for image, cam in enumerate(cams):
        keys = [0, *(labels[image].nonzero().flatten() + 1).tolist()]
        scores = torch.cat([torch.full_like(cam[:1], background), cam])[keys].flatten(1).softmax(0)
        for key, score in zip(keys, scores, strict=True):
            result[image, key] = (score @ affinity[image]).view(cams.shape[2:])
    return result


def only_inside(labels: Tensor, boxes: Sequence[Box]) -> Tensor:
    """The labels (B, H, W), ignored outside the boxes."""
    result = torch.full_like(labels, IGNORE)
    for image, (top, bottom, left, right) in enumerate(boxes):
        result[image, top:bottom, left:right] = labels[image, top:bottom, left:right]
    return result


def plain_cam_labels(cams: Tensor, labels: Tensor, images: Tensor, boxes: Sequence[Box], settings: Settings) -> Tensor:
    """Labels of PAR-refined CAMs (B, K, H, W), the boxes applied last; images in [0, 1]."""
    given = settings.high, settings.low, settings.dilations, settings.par_iterations
    found = [plain_pixel_labels(*one, *given) for one in zip(cams, labels, images, strict=True)]
    return only_inside(torch.stack(found), boxes)


def plain_refined(cams: Tensor, labels: Tensor, images: Tensor, boxes: Sequence[Box], settings: Settings) -> Tensor:
    """PAR of walked CAMs (B, K + 1, H, W) by half the image, box by box, without softmax; 0 outside."""
    result = torch.zeros_like(cams)
    for image, (top, bottom, left, right) in enumerate(boxes):
        keys = [0, *(labels[image].nonzero().flatten() + 1).tolist()]
        y, x = slice(top, bottom), slice(left, right)
        picture = images[image, :, y, x][None]
        half = resize(picture, [side // 2 for side in picture.shape[-2:]])
        maps = F.interpolate(cams[image, keys, y, x][None], half.shape[-2:], mode="bilinear", align_corners=True)
        maps = plain_par(half, maps, settings.dilations, settings.par_iterations)
        result[image, keys, y, x] = resize(maps, picture.shape[-2:])[0]
    return result


def plain_walk_labels(
    cams: Tensor, affinity: Tensor, labels: Tensor, images: Tensor, boxes: Sequence[Box], settings: Settings
) -> tuple[Tensor, Tensor, Tensor]:
    """Labels of the PAR-refined walk, and the winners with the low and with the high background before them."""
    size, winners = cams.shape[-2:], []
    grid = [int(side * max(settings.scales)) // STRIDE for side in size]
    small = resize(cams * labels[:, :, None, None], grid)
    for background in (settings.low, settings.high):
        walked = plain_walk(small, affinity, plain_mask(*grid, settings.radius, cams.device), labels, background)
        walked = resize(walked, size)
        winners.append(plain_refined(walked, labels, images, boxes, settings).argmax(1))
    low, high = winners
    label = high.masked_fill(high == 0, IGNORE).masked_fill((high == 0) & (low == 0), 0)
    return only_inside(label, boxes), low, high


def plain_affinity_labels(labels: Tensor, mask: Tensor) -> Tensor:
    """1 same, 0 different, 255 ignored: label maps (B, H, W) -> (B, n, n)."""
    grid = [side // STRIDE for side in labels.shape[-2:]]
    tokens = F.interpolate(labels[:, None].float(), grid, mode="nearest").flatten(1)
    result = torch.stack([(row[None] == row[:, None]).long() for row in tokens])
    for same, ignored in zip(result, tokens == IGNORE, strict=True):
        same[~mask | ignored | ignored[:, None]] = IGNORE
    return result


def plain_affinity_loss(affinity: Tensor, targets: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The loss, and the counts of positive and negative pairs + 1."""
    positive, negative = (targets == 1).to(affinity.dtype), (targets == 0).to(affinity.dtype)
    counts = positive.sum() + 1, negative.sum() + 1
    loss = 0.5 * ((positive * (1 - affinity)).sum() / counts[0] + (negative * affinity).sum() / counts[1])
    return loss, *counts


def plain_losses(
    network: nn.Module, images: Tensor, labels: Tensor, boxes: Sequence[Box], iteration: int, settings: Settings,
    seen: dict[str, Tensor] | None = None,
) -> dict[str, Tensor]:
    """The unweighted terms of an iteration, from 0. seen: takes what else it makes, named as in the goldens."""
    logits, segmentation, _, affinity = network(images)
    cams, walk = plain_cams(network, images, settings.scales)
    with torch.no_grad():
        pictures = denormalize(images).to(torch.uint8)
        given = labels, pictures.to(images.dtype) / 255, boxes, settings
        cam_label = plain_cam_labels(cams, *given)
        label, low, high = plain_walk_labels(cams, walk, *given)
        label = cam_label if iteration <= settings.walk_after else label
        mask = plain_mask(*(side // STRIDE for side in images.shape[-2:]), settings.radius, images.device)
        targets = plain_affinity_labels(label if settings.affinity_follows else cam_label, mask)
    affinity_loss, *counts = plain_affinity_loss(affinity, targets)
    if seen is not None:
        seen |= dict(refined_pseudo_label=cam_label, refined_aff_label=label, aff_label=targets, denorm_u8=pictures)
        seen |= dict(refined_aff_label_l=low, refined_aff_label_h=high, cls=logits.detach(), counts=counts)
    seg_loss = plain_segmentation_loss(resize(segmentation, images.shape[-2:]), label)
    return dict(cls=F.multilabel_soft_margin_loss(logits, labels), seg=seg_loss, affinity=affinity_loss)


class PlainAFA(AFA):
    """AFA with this network, which starts from the same weights, and with these losses; for training alone."""

    def __init__(self, config: Any, num_classes: int) -> None:
        super().__init__(config, num_classes)
        released = {official_name(name): value for name, value in self.network.state_dict().items()}
        backbone, m = self.network.backbone, config.model
        sizes = backbone.channels, backbone.depths, backbone.heads, backbone.sr_ratios, m.strides
        self.network = PlainNetwork(*sizes, m.decoder_channels, num_classes + 1, m.dropout)
        self.network.load_state_dict(released)
        c = config.pseudo_labels
        self.settings = Settings(
            c.cam_scales, c.radius, c.high, c.low, c.par_dilations, c.par_iterations, c.walk_after, c.walk_for_affinity
        )

    def losses(self, batch: Batch, iteration: int) -> dict[str, Tensor]:
        boxes = boxes_of(batch.valid)
        return plain_losses(self.network, batch.images, batch.labels, boxes, iteration, self.settings)

    def param_groups(self, train: Any) -> list[dict]:
        groups = {"encoder": [], "norms": [], "heads": [], "decoder": []}
        for name, value in self.network.named_parameters():
            part = name.split(".")[0]
            kind = "norms" if part == "encoder" and "norm" in name else part if part in groups else "heads"
            groups[kind].append(value)
        head_lr = train.lr * train.head_lr_factor
        rates = {"encoder": train.lr, "norms": 0.0, "heads": head_lr, "decoder": head_lr}
        found = [{"name": name, "params": params, "lr": rates[name]} for name, params in groups.items()]
        found[1]["weight_decay"] = 0.0
        return found
