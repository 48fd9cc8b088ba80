"""The network of ACR: a ViT with one class token, and a linear classifier on it."""

from typing import NamedTuple

import torch
from torch import Tensor, nn

from model.backbones.class_token_vit import ClassTokenViT
from model.losses.consistency import comparison
from model.multi_scale import full_precision, with_flip


class Outputs(NamedTuple):
    """Of images and of their mirrors."""

    class_logits: Tensor      # (B, K)
    mirror_logits: Tensor     # (B, K)
    consistency: Tensor       # (2,), class to patch and patch to patch, the mean over all blocks


class ACRNetwork(nn.Module):
    """Images (B, 3, H, W) -> Outputs, and the logits of tokens."""

    def __init__(self, backbone: ClassTokenViT, num_classes: int) -> None:
        super().__init__()
        self.backbone = backbone
        self.classifier = nn.Linear(backbone.embed_dim, num_classes)

    def forward(self, images: Tensor) -> Outputs:
        tokens, consistency = self.backbone(with_flip(images, True), comparison(self.backbone, images))
        logits = self.logits(tokens[:, self.backbone.class_tokens])[:, 0]
        return Outputs(*logits.chunk(2), torch.stack(consistency).mean(0))

    def classify(self, images: Tensor) -> Tensor:
        """Class logits (B, K)."""
        tokens, _ = self.backbone.forward(images)
        return self.logits(tokens[:, self.backbone.class_tokens])[:, 0]

    def logits(self, tokens: Tensor) -> Tensor:
        """(B, n, D) -> (B, n, K)."""
        with torch.autocast(tokens.device.type, enabled=False):
            return self.classifier(full_precision(tokens))

    def patch_cam(self, patches: Tensor, grid: tuple[int, int]) -> Tensor:
        """CAM (B, K, h, w): what is positive of the classifier on every patch (B, h*w, D)."""
        return self.logits(patches).relu().transpose(1, 2).unflatten(2, grid)
