"""The network of MoRe: multi-class-token ViT, two classifiers, GCR and a LargeFOV decoder."""

from typing import NamedTuple

import torch.nn.functional as F
from torch import Tensor, nn

from model.backbones.vit import MultiClassTokenViT
from model.decoders.largefov import LargeFOV
from model.more.gcr import GraphCategoryRepresentation


class Outputs(NamedTuple):
    """What one forward gives; D is the width of the backbone, h w its patch grid."""

    class_logits: Tensor      # (B, K)
    aux_logits: Tensor        # (B, K), from the auxiliary map
    seg_logits: Tensor        # (B, K+1, h, w)
    class_tokens: Tensor      # (B, K, D), through GCR
    patches: Tensor           # (B, D, h, w)
    aux: Tensor               # (B, D, h, w), the auxiliary map


class MoReNetwork(nn.Module):
    """Images (B, 3, H, W) -> Outputs, and the coarse maps (B, K, h, w) that localisation is made from."""

    def __init__(self, backbone: MultiClassTokenViT, token_ratio: float, decoder_channels: int) -> None:
        super().__init__()
        dim, classes = backbone.embed_dim, backbone.num_classes
        self.backbone = backbone
        self.classifier = nn.Conv2d(dim, classes, 1, bias=False)
        self.aux_classifier = nn.Conv2d(dim, classes, 1, bias=False)
        self.gcr = GraphCategoryRepresentation(dim, token_ratio)
        self.decoder = LargeFOV(dim, decoder_channels, classes + 1)

    def forward(self, images: Tensor) -> Outputs:
        features = self.backbone(images)
        return Outputs(
            class_logits=self.classifier(F.adaptive_max_pool2d(features.patches, 1)).flatten(1),
            aux_logits=self.aux_classifier(F.adaptive_max_pool2d(features.aux, 1)).flatten(1),
            seg_logits=self.decoder(features.patches),
            class_tokens=self.gcr(features.class_tokens, features.patches.flatten(2).transpose(1, 2)),
            patches=features.patches,
            aux=features.aux,
        )

    def classify(self, images: Tensor) -> Tensor:
        """Class logits (B, K)."""
        return self.classifier(F.adaptive_max_pool2d(self.backbone(images).patches, 1)).flatten(1)

    def segment(self, images: Tensor) -> Tensor:
        """Segmentation logits (B, K+1, h, w)."""
        return self.decoder(self.backbone(images).patches)

    def cams(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """CAM and auxiliary CAM, (B, K, h, w) each: the classifiers on every patch (Zhou et al., CVPR 2016)."""
        features = self.backbone(images)
        return self.cams_of(features.patches, features.aux)

    def cams_of(self, patches: Tensor, aux: Tensor) -> tuple[Tensor, Tensor]:
        """`cams` from the backbone's maps."""
        return self.classifier(patches), self.aux_classifier(aux)

    def lam(self, images: Tensor) -> Tensor:
        """Localization attention map (B, K, h, w): patch features times class tokens."""
        features = self.backbone(images)
        tokens = self.gcr(features.class_tokens, features.patches.flatten(2).transpose(1, 2))
        return (tokens @ features.patches.flatten(2)).unflatten(2, features.patches.shape[-2:])
