"""ACR formulated plainly, as the released code computes it: what its step, its GETAM and its sweep are compared with.

Image and mirror pass through the network one after the other, and every block keeps its attention after the softmax.
The flip is undone row by row of the token grid, GETAM takes a backward pass through the whole network for each class,
and the sweep looks at every pixel again at each threshold. Nothing of model/acr computes here: tests take this for an
oracle. The parameters have the released names; those that no output depends on are left out.
"""

from collections import OrderedDict
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from timm.layers.padding import pad_same
from timm.layers.std_conv import StdConv2dSame
from timm.models.resnetv2 import ResNetV2
from torch import Tensor, nn

from model import build_method
from model.method import Method
from utils.batch import Batch
from utils.images import IGNORE

STRIDE = 16   # of the tokens
# released, without a gradient: the result of the final norm is thrown away, the other layers belong to no head
DEAD = ("pretrained.model.bkg_token", "pretrained.model.norm.", "pretrained.model.head.", "scratch.")
norm = partial(nn.LayerNorm, eps=1e-6)


class StandardizedConv(StdConv2dSame):
    """Its epsilon is added to the standard deviation of a filter, and not to the variance."""

    def forward(self, x: Tensor) -> Tensor:
        dims, weight = (1, 2, 3), self.weight
        std = weight.std(dims, correction=0, keepdim=True)
        weight = (weight - weight.mean(dims, keepdim=True)) / (std + 1e-5)
        return F.conv2d(pad_same(x, self.kernel_size, self.stride), weight, self.bias, self.stride)


class Block(nn.Module):
    def __init__(self, dim: int, heads: int) -> None:
        super().__init__()
        self.heads, self.norm1, self.norm2 = heads, norm(dim), norm(dim)
        self.attn = nn.ModuleDict({"qkv": nn.Linear(dim, 3 * dim), "proj": nn.Linear(dim, dim)})
        self.mlp = nn.ModuleDict({"fc1": nn.Linear(dim, 4 * dim), "fc2": nn.Linear(4 * dim, dim)})

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """The tokens, and the attention (B, heads, n, n)."""
        q, k, v = self.attn["qkv"](self.norm1(x)).unflatten(2, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        attention = (q @ k.transpose(-2, -1) * q.shape[-1] ** -0.5).softmax(-1)
        x = x + self.attn["proj"]((attention @ v).transpose(1, 2).flatten(2))
        return x + self.mlp["fc2"](F.gelu(self.mlp["fc1"](self.norm2(x)))), attention


class Outputs(NamedTuple):
    """tokens: (B, 1 + n, D), not normalised. maps: the mean over heads of every block's attention (B, blocks, 1 + n,
    1 + n). cam: (B, n, K), not negative."""

    logits: Tensor
    patch_logits: Tensor
    maps: Tensor
    cam: Tensor
    tokens: Tensor


class PlainNetwork(nn.Module):
    """Arguments as in the `cfg_*` entries of the goldens. resnet_layers: blocks of the hybrid's stages; none: a ViT.
    attentions: of every block in the last forward pass."""

    def __init__(
        self, embed_dim: int, depth: int, num_heads: int, img_size: int, num_classes: int,
        resnet_layers: Sequence[int] = (), resnet_width_factor: float = 1.0, patch_size: int = STRIDE,
    ) -> None:
        super().__init__()
        vit, embed, inputs = nn.Module(), OrderedDict(), 3
        if resnet_layers:
            settings = dict(num_classes=0, global_pool="", preact=False, stem_type="same", conv_layer=StandardizedConv)
            embed["backbone"] = ResNetV2(resnet_layers, width_factor=resnet_width_factor, **settings)
            inputs = embed["backbone"].num_features
        embed["proj"] = nn.Conv2d(inputs, embed_dim, *(1, 1) if resnet_layers else (patch_size, patch_size))
        vit.patch_embed = nn.Sequential(embed)
        vit.cls_token = nn.Parameter(torch.zeros(1, 1, embed_dim))
        vit.pos_embed = nn.Parameter(torch.zeros(1, 1 + (img_size // patch_size) ** 2, embed_dim))
        vit.blocks = nn.ModuleList(Block(embed_dim, num_heads) for _ in range(depth))
        self.pretrained, self.cls_head = nn.ModuleDict({"model": vit}), nn.Linear(embed_dim, num_classes)
        self.attentions: list[Tensor] = []

    def load_released(self, weights: Mapping[str, Tensor]) -> None:
        self.load_state_dict({name: value.float() for name, value in weights.items() if not name.startswith(DEAD)})

    def forward(self, images: Tensor) -> Outputs:
        vit = self.pretrained["model"]
        x = vit.patch_embed(images)
        table, side = vit.pos_embed[:, 1:], round((vit.pos_embed.shape[1] - 1) ** 0.5)
        table = F.interpolate(table.transpose(1, 2).unflatten(2, (side, side)), x.shape[-2:], mode="bilinear")
        table = torch.cat([vit.pos_embed[:, :1], table.flatten(2).transpose(1, 2)], 1)
        x = torch.cat([vit.cls_token.expand(len(x), -1, -1), x.flatten(2).transpose(1, 2)], 1) + table
        self.attentions = []
        for block in vit.blocks:
            x, attention = block(x)
            self.attentions.append(attention)
        maps = torch.stack([attention.mean(1) for attention in self.attentions], 1)
        patches = x[:, 1:]
        return Outputs(self.cls_head(x[:, 0]), self.cls_head(patches.mean(1)), maps, self.cls_head(patches).relu(), x)


def plain_mirror_terms(maps: Tensor, mirrored: Tensor) -> tuple[Tensor, ...]:
    """Mean absolute differences of the class rows and of the affinities of maps (B, blocks, 1 + n, 1 + n) of square
    images and their mirrors, and class rows and affinities of the mirror with the flip undone."""
    side = round((maps.shape[-1] - 1) ** 0.5)
    class_row, affinity = mirrored[:, :, :1, 1:].clone(), mirrored[:, :, 1:, 1:].clone()
    for tokens in (slice(row * side, (row + 1) * side) for row in range(side)):
        class_row[..., tokens] = class_row[..., tokens].flip(-1)
        affinity[..., tokens] = affinity[..., tokens].flip(-1)
        affinity[:, :, tokens] = affinity[:, :, tokens].flip(2)
    return F.l1_loss(maps[:, :, :1, 1:], class_row), F.l1_loss(maps[:, :, 1:, 1:], affinity), class_row, affinity


def plain_losses(network: nn.Module, images: Tensor, labels: Tensor) -> tuple[dict[str, Tensor], list[Outputs]]:
    """The unweighted terms of an iteration, and the outputs for the images and for their mirrors."""
    outputs = [network(images), network(images.flip(-1))]
    soft_margins = [F.multilabel_soft_margin_loss(out.logits, labels) for out in outputs]
    class_term, affinity_term = plain_mirror_terms(*(out.maps for out in outputs))[:2]
    terms = {"cls": soft_margins[0], "cls_mirror": soft_margins[1]}
    return terms | {"consistency_class": class_term, "consistency_affinity": affinity_term}, outputs


def plain_rate(lr: float, step: int, max_step: int) -> float:
    """From max_step on it stays what it was."""
    return lr * (1 - min(step, max_step - 1) / max_step) ** 0.9


def plain_optimizer(parameters: Sequence[nn.Parameter], lr: float, weight_decay: float) -> torch.optim.SGD:
    """As released: what is called the weight decay becomes the momentum, and nothing decays."""
    return torch.optim.SGD(parameters, lr, momentum=weight_decay, foreach=False, fused=False)


def plain_gradients(network: PlainNetwork, image: Tensor, classes: Sequence[int]) -> tuple[list[Tensor], Tensor, list]:
    """Of an image (1, 3, H, W): attention (heads, 1 + n, 1 + n) of every block; its mean over heads between patches (n,
    n), summed over all blocks; for each class the gradients of its logit with respect to the attention, from a backward
    pass through the whole network."""
    out, attentions, found = network(image), network.attentions, []
    for attention in attentions:
        attention.retain_grad()
    for number in classes:
        network.zero_grad()
        for attention in attentions:
            attention.grad = None
        out.logits[0, number].backward(retain_graph=True)
        found.append([attention.grad[0] for attention in attentions])
    return [attention.detach()[0] for attention in attentions], out.maps[0, :, 1:, 1:].sum(0).detach(), found


def plain_getam(
    maps: Sequence[Tensor], affinity: Tensor, gradients: Sequence[Sequence[Tensor]], function: str = "grad",
    start_layer: int = 10, refine: bool = True,
) -> Tensor:
    """Token maps (classes, n) from what `plain_gradients` gives."""
    found = []
    for of_blocks in gradients:
        total = sum(map(partial(plain_relevance, function), maps[start_layer:], of_blocks[start_layer:]))
        tokens = total[0, 1:].relu()
        found.append(affinity @ tokens if refine else tokens)
    return torch.stack(found)


def plain_relevance(function: str, attention: Tensor, gradient: Tensor) -> Tensor:
    """Of attention and gradient (heads, n, n) of a block -> (n, n)."""
    if function.startswith("grad"):
        positive = gradient.relu().mean(0)
        return positive**2 if function == "grad_s" else positive
    weighted = (gradient * attention).relu().mean(0)
    return weighted * gradient.relu().mean(0) if function == "cam_grad_s" else weighted


def plain_localization(
    passes: Sequence[Tensor], grid: Sequence[int], size: Sequence[int], getam: bool = True
) -> tuple[Tensor, list[Tensor]]:
    """Maps (classes, *size) in [0, 1], and what they are the sum of, from the token maps (classes, n) of an image's
    mirror and of the image. getam: or the patch CAM."""
    parts = []
    for mirrored, tokens in zip((True, False), passes, strict=True):
        maps = F.interpolate(tokens.view(1, -1, *grid), tuple(size), mode="bilinear", align_corners=getam)[0]
        parts.append(maps.flip(-1) if mirrored else maps)
    total = sum(parts)
    low, high = total.amin((1, 2), keepdim=True), total.amax((1, 2), keepdim=True)
    return (total - low) / (high - low + (1e-6 if getam else 1e-5)), parts


def plain_sweep(
    stored: Sequence[Mapping[int, Tensor]], labels: Sequence[Tensor], thresholds: Sequence[float], num_classes: int = 21
) -> Tensor:
    """IoU (thresholds, num_classes) of the maps {class from 0: (H, W)} of every image, each threshold standing for the
    background; a class that is nowhere counts 0."""
    found = []
    for threshold in thresholds:
        confusion = torch.zeros(num_classes, num_classes, dtype=torch.int64)
        for maps, label in zip(stored, labels, strict=True):
            scores = torch.zeros(num_classes, *label.shape)
            scores[0] = threshold
            for number, values in maps.items():
                scores[number + 1] = values
            known = label != IGNORE
            pairs = label[known].long() * num_classes + scores.argmax(0)[known]
            confusion += pairs.bincount(minlength=num_classes**2).view(num_classes, num_classes)
        hits, true, predicted = confusion.diag().double(), confusion.sum(1), confusion.sum(0)
        found.append(hits / (true + predicted - hits + 1e-10))
    return torch.stack(found)


class PlainACR(Method):
    """ACR with this network, which starts from the same weights, and with these losses; for training alone."""

    def __init__(self, config: Any, num_classes: int) -> None:
        super().__init__(config, num_classes)
        ours, prefix = build_method(config, num_classes).network, "pretrained.model."
        vit, resnet = ours.backbone, getattr(ours.backbone.patch_embed, "backbone", None)
        stages = ([len(stage.blocks) for stage in resnet.stages], resnet.stem.conv.out_channels / 64) if resnet else ()
        sizes = vit.embed_dim, len(vit.blocks), vit.blocks[0].attn.num_heads, STRIDE * vit.grid_size[0], num_classes
        self.network = PlainNetwork(*sizes, *stages)
        released = {
            name.replace("backbone.", prefix, 1).replace("classifier", "cls_head"): value
            for name, value in ours.state_dict().items()
        }
        released[f"{prefix}cls_token"] = released.pop(f"{prefix}tokens")
        positions = [released.pop(f"{prefix}{part}_pos") for part in ("token", "patch")]
        self.network.load_released(released | {f"{prefix}pos_embed": torch.cat(positions, 1)})

    def losses(self, batch: Batch, iteration: int) -> dict[str, Tensor]:
        return plain_losses(self.network, batch.images, batch.labels)[0]
