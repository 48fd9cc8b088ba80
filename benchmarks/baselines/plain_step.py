"""MoRe's losses formulated plainly, as the release computes them: what benchmarks/benchmark.py step compares ours with.

Attention is not fused, and the training forward keeps its maps; no pass of the CAM is shared with it; PAR runs image by
image and once for each background, over convolutions that shift; the two losses of LIR loop over images,
classes and tokens in Python; the bilateral filter of the energy loss runs on the host. The results are those of
model/more/method.py but for rounding; tests take this for an oracle. Crops without padding only.
"""

from collections.abc import Callable, Sequence

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from model.losses.affinity import ptc_loss
from model.more.lir import EPS, MIN_WINDOW_SUM, WINDOW, token_loss
from model.more.method import FROM_PSEUDO_LABELS, MoRe
from model.more.network import Outputs
from model.multi_scale import min_max
from model.par import COLOUR_WIDTH, POSITION_WEIGHT
from model.pseudo_labels import Present
from utils.batch import Batch
from utils.images import IGNORE, denormalize

Filter = Callable[[Tensor, Tensor, float, float], Tensor]   # images, maps, sigma_rgb, sigma_xy -> maps, on the host


class PlainMoRe(MoRe):
    """MoRe with the losses formulated plainly; it has the same parameters. host_filter: a bilateral filter."""

    host_filter: Filter

    def losses(self, batch: Batch, iteration: int) -> dict[str, Tensor]:
        weights = self.loss_weights(iteration)
        cams = self._all_cams(batch.images) if any(weights[term] for term in FROM_PSEUDO_LABELS) else None
        maps: list[Tensor] = []
        out = plain_forward(self.network, batch.images, maps)
        everyone = torch.arange(self.num_classes, device=batch.labels.device).expand_as(batch.labels)
        present = Present(everyone, batch.labels > 0)
        pseudo = self.pseudo_labels(cams, present, batch, out.patches.shape[-2:], iteration)
        logits = F.interpolate(out.seg_logits, batch.images.shape[-2:], mode="bilinear", align_corners=False)
        c = self.config.loss
        h, w = (max(side - WINDOW, 0) for side in out.patches.shape[-2:])
        tokens = [
            plain_samples(label, order, c.uncertain_tokens)
            for label, order in zip(pseudo["uncertain"], self.token_order(batch.seeds, h * w), strict=True)
        ]
        return dict(
            cls=F.multilabel_soft_margin_loss(out.class_logits, batch.labels),
            cls_aux=F.multilabel_soft_margin_loss(out.aux_logits, batch.labels),
            token=token_loss(out.class_tokens, c.token_temperature),
            ptc=ptc_loss(out.patches, pseudo["ptc"]),
            certain=plain_certain_loss(out, pseudo["certain"], batch.labels, c.certain_temperature),
            uncertain=plain_uncertain_loss(out, tokens, batch.labels),
            seg=plain_segmentation_loss(logits, pseudo["pixel"]),
            energy=plain_energy_loss(logits, batch.images, pseudo["pixel"], c, self.host_filter),
        )

    @torch.no_grad()
    def _all_cams(self, images: Tensor) -> dict[str, Tensor]:
        """CAM and auxiliary CAM: image and flip in one batch at every scale."""
        size, total = images.shape[-2:], [0, 0]
        for scale in [1.0, *(s for s in self.config.pseudo_labels.cam_scales if s != 1.0)]:
            shape = [int(scale * side) for side in size]
            scaled = F.interpolate(images, shape, mode="bilinear", align_corners=False) if scale != 1 else images
            _, patches, aux = plain_features(self.network.backbone, torch.cat([scaled, scaled.flip(-1)]))
            for index, coarse in enumerate((self.network.classifier(patches), self.network.aux_classifier(aux))):
                maps = F.interpolate(coarse, size, mode="bilinear", align_corners=False)
                straight, mirrored = maps.chunk(2)
                total[index] = total[index] + torch.maximum(straight, mirrored.flip(-1)).relu()
        return dict(cam=min_max(total[0]), cam_aux=min_max(total[1]))

    @torch.no_grad()
    def _pixel_labels(self, cam: Tensor, present: Present, image: Tensor) -> Tensor:
        c = self.config.pseudo_labels
        return torch.stack([
            plain_pixel_labels(*one, c.high, c.low, c.par_dilations, c.par_iterations)
            for one in zip(cam, present.there.float(), image, strict=True)
        ])


def plain_features(
    backbone: nn.Module, images: Tensor, maps: list[Tensor] | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """Class tokens, patches and auxiliary map as `MultiClassTokenViT.forward`. maps: takes every block's attention."""
    x = backbone.patch_embed.proj(images)
    h, w = x.shape[-2:]
    x = backbone.patch_embed.norm(x.flatten(2).transpose(1, 2))
    x = torch.cat([backbone.tokens.expand(len(x), -1, -1), x], 1) + backbone.positions(*images.shape[-2:])
    x = backbone.norm_pre(x)
    prefix = backbone.tokens.shape[1]
    for index, block in enumerate(backbone.blocks):
        attended, attention = plain_attention(block.attn, block.norm1(x))
        x = x + attended
        if maps is not None:
            maps.append(attention)
        del attention
        x = x + block.mlp(block.norm2(x))
        if index == backbone.aux_block:
            aux = x[:, prefix:].transpose(1, 2).reshape(len(x), -1, h, w)
    x = backbone.norm(x)
    patches = x[:, prefix:].transpose(1, 2).reshape(len(x), -1, h, w)
    return x[:, backbone.registers : prefix], patches, aux


def plain_attention(attention: nn.Module, x: Tensor) -> tuple[Tensor, Tensor]:
    """What the layer gives, and its map (B, heads, N, N)."""
    batch, count, dim = x.shape
    heads = attention.num_heads
    q, k, v = attention.qkv(x).reshape(batch, count, 3, heads, dim // heads).permute(2, 0, 3, 1, 4)
    weights = ((q @ k.transpose(-2, -1)) * (dim // heads) ** -0.5).softmax(-1)
    return attention.proj((weights @ v).transpose(1, 2).reshape(batch, count, dim)), weights


def plain_forward(network: nn.Module, images: Tensor, maps: list[Tensor]) -> Outputs:
    class_tokens, patches, aux = plain_features(network.backbone, images, maps)
    return Outputs(
        class_logits=network.classifier(F.adaptive_max_pool2d(patches, 1)).flatten(1),
        aux_logits=network.aux_classifier(F.adaptive_max_pool2d(aux, 1)).flatten(1),
        seg_logits=network.decoder(patches),
        class_tokens=network.gcr(class_tokens, patches.flatten(2).transpose(1, 2)),
        patches=patches,
        aux=aux,
    )


def plain_par(image: Tensor, maps: Tensor, dilations: Sequence[int], iterations: int) -> Tensor:
    """PAR of maps (1, C, H, W) by the image (1, 3, H, W) in [0, 1]: all neighbours at once, by convolutions."""
    ring = [i for i in range(9) if i != 4]
    kernel = torch.eye(9, device=image.device)[ring].view(8, 1, 3, 3)

    def neighbours(x: Tensor) -> Tensor:   # (1, C, H, W) -> (1, C, n, H, W)
        channels = x.flatten(0, 1).unsqueeze(1)
        shifted = [F.conv2d(F.pad(channels, (d,) * 4, mode="replicate"), kernel, dilation=d) for d in dilations]
        return torch.cat(shifted, 1).unsqueeze(0)

    around = neighbours(image)
    colour = -(((around - image.unsqueeze(2)).abs() / (around.std(2, keepdim=True) + 1e-8) / COLOUR_WIDTH) ** 2)
    ones = torch.tensor([2**0.5 if i in (0, 2, 6, 8) else 1.0 for i in ring], device=image.device)
    distance = torch.cat([d * ones for d in dilations])
    position = -((distance / (distance.std() + 1e-8) / COLOUR_WIDTH) ** 2)
    weights = colour.mean(1).softmax(1) + POSITION_WEIGHT * position.softmax(0).view(1, -1, 1, 1)
    for _ in range(iterations):
        maps = (neighbours(maps) * weights.unsqueeze(1)).sum(2)
    return maps


def plain_pixel_labels(
    cam: Tensor, labels: Tensor, image: Tensor, high: float, low: float, dilations: Sequence[int], iterations: int
) -> Tensor:
    """`model.pseudo_labels.refined_labels` of one image: cam (K, H, W), labels (K,), image (3, H, W) in [0, 1]."""
    size = image.shape[-2:]
    half = (size[0] // 2, size[1] // 2)
    small = F.interpolate(image[None], half, mode="bilinear", align_corners=False)
    cam = F.interpolate((cam * labels[:, None, None])[None], half, mode="bilinear", align_corners=False)
    present = labels.nonzero().flatten().tolist()
    found = []
    for background in (high, low):
        scores = torch.cat([torch.full_like(cam[:, :1], background), cam[:, present]], 1).softmax(1)
        refined = plain_par(small, scores, dilations, iterations)
        refined = F.interpolate(refined, size, mode="bilinear", align_corners=False)
        found.append(torch.tensor([0] + [c + 1 for c in present], device=cam.device)[refined[0].argmax(0)])
    strict, loose = found
    label = strict.clone()
    label[strict == 0] = IGNORE
    label[(strict == 0) & (loose == 0)] = 0
    return label


def plain_samples(label: Tensor, order: Tensor, count: int) -> list[tuple[int, int]]:
    """The tokens (row, column) of one image that the uncertain loss uses, as `sample_uncertain` counts them."""
    h, w = label.shape
    code = torch.where(label == IGNORE, 1.0, torch.where(label == 0, 0.0, 2.0))
    half, places, rank = WINDOW // 2, [], {}
    candidates, foreground = [], []
    for i in range(h - WINDOW):
        for j in range(w - WINDOW):
            places.append((i, j))
            rank[i, j] = int(order[len(places) - 1])
            if int(label[i + half, j + half]) == IGNORE:
                if float(code[i : i + WINDOW, j : j + WINDOW].sum()) >= MIN_WINDOW_SUM:
                    candidates.append((i, j))
            elif int(label[i + half, j + half]) != 0:
                foreground.append((i, j))
    more = max((count - len(candidates)) // 4, 0)
    pool = foreground if len(foreground) >= more else places
    chosen = sorted(candidates, key=rank.get)[:count]
    return chosen + sorted(pool, key=rank.get)[:more]


def plain_uncertain_loss(out: Outputs, tokens: list[list[tuple[int, int]]], labels: Tensor) -> Tensor:
    """`uncertain_loss`, token by token. tokens: the sampled ones of every image."""
    losses = []
    for image, places in enumerate(tokens):
        classes = F.normalize(out.class_tokens[image].detach(), dim=-1)
        for i, j in places:
            patch = F.normalize(out.patches[image, :, i, j], dim=0)
            attract, repel, present = 0, 0, int(labels[image].sum())
            for index, token in enumerate(classes):
                similarity = (token * patch).sum().abs()
                if labels[image, index] > 0:
                    attract = attract + similarity
                else:
                    repel = repel + similarity
            losses.append(0.5 * (1 - attract / (present + 1)) + 0.5 * repel / (len(classes) - present + 1))
    return torch.stack(losses).mean() if losses else out.patches.sum() * 0


def plain_certain_loss(out: Outputs, token_labels: Tensor, labels: Tensor, temperature: float) -> Tensor:
    """`certain_loss`, image by image and class by class; exp overflows where logits exceed 88."""
    total = 0
    for tokens, patches, label, present in zip(out.class_tokens, out.patches, token_labels, labels, strict=True):
        for index in range(len(present)):
            if present[index] > 0:
                logits = (F.normalize(tokens[index], dim=0) @ patches.detach().flatten(1) / temperature).exp()
                negative_log = -(logits / (logits.sum() + EPS)).log()
                certain = label.flatten() == index + 1
                total = total + (negative_log * certain).sum() / (certain.sum() + EPS)
    return (total + out.class_tokens.sum() * 0) / len(labels)


def plain_segmentation_loss(logits: Tensor, labels: Tensor) -> Tensor:
    """`segmentation_loss`: a cross entropy for the background and one for the foreground."""
    background, foreground = labels.clone(), labels.clone()
    background[labels != 0] = IGNORE
    foreground[labels == 0] = IGNORE
    losses = [
        F.cross_entropy(logits, part, ignore_index=IGNORE, reduction="sum") / ((part != IGNORE).sum() + 1e-6)
        for part in (background, foreground)
    ]
    return 0.5 * sum(losses)


def plain_energy_loss(logits: Tensor, images: Tensor, labels: Tensor, config, host_filter: Filter) -> Tensor:
    """`energy_loss`, with the filter on the host."""
    scale = config.energy_scale
    half = {"scale_factor": scale, "recompute_scale_factor": True}
    prob = F.interpolate(logits.softmax(1), mode="bilinear", align_corners=False, **half)
    unlabelled = F.interpolate(labels[:, None].float(), mode="nearest", **half) == IGNORE
    pixels = F.interpolate(denormalize(images), mode="nearest", **half)
    sigmas = config.energy_sigma_rgb, config.energy_sigma_xy * scale
    return -config.energy_weight * _HostAgreement.apply(prob, pixels, unlabelled, host_filter, sigmas) / len(logits)


class _HostAgreement(torch.autograd.Function):
    """As `model.losses.energy._Agreement`, through numpy on the host."""

    @staticmethod
    def forward(ctx, prob: Tensor, pixels: Tensor, unlabelled: Tensor, host_filter: Filter, sigmas) -> Tensor:
        maps, image = prob.detach().cpu().numpy(), pixels.cpu().numpy()
        gate = np.clip(1 - maps.max(1, keepdims=True), 0, None)
        gate[unlabelled.cpu().numpy()] = 1
        filtered = host_filter(torch.from_numpy(image), torch.from_numpy(maps), *sigmas).numpy()
        agreement = filtered * gate
        ctx.save_for_backward(torch.from_numpy(agreement).to(prob.device))
        return prob.new_tensor((maps * agreement).sum())

    @staticmethod
    def backward(ctx, grad: Tensor):
        return 2 * grad * ctx.saved_tensors[0], None, None, None, None
