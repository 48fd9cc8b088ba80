"""The network of MoRe: multi-class-token ViT, two classifiers, GCR and a LargeFOV decoder."""

from collections.abc import Collection
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from model.backbones.vit import MultiClassTokenViT, ViTFeatures
from model.decoders.largefov import LargeFOV
from model.losses.consistency import comparison
from model.more.gcr import GraphCategoryRepresentation
from model.multi_scale import full_precision, with_flip


class Outputs(NamedTuple):
    """What one forward gives; D is the width of the backbone, h w its patch grid."""

    class_logits: Tensor      # (B, K)
    aux_logits: Tensor        # (B, K), from the auxiliary map
    seg_logits: Tensor        # (B, K+1, h, w)
    class_tokens: Tensor      # (B, K, D), through GCR
    patches: Tensor           # (B, D, h, w)
    aux: Tensor               # (B, D, h, w), the auxiliary map
    consistency: Tensor | None = None   # (2,), class to patch and patch to patch, where it was asked for


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

    def forward(self, images: Tensor, consistency: bool = False) -> Outputs:
        """consistency: whether the mirrors of the images go through the backbone, too, and attentions are compared."""
        features = self._features_of_both_views(images) if consistency else self._features(images)
        seg_logits = self.decoder(features.patches)
        with _exact(images):
            return Outputs(
                class_logits=self.classifier(F.adaptive_max_pool2d(features.patches, 1)).flatten(1),
                aux_logits=self.aux_classifier(F.adaptive_max_pool2d(features.aux, 1)).flatten(1),
                seg_logits=seg_logits,
                class_tokens=self._class_tokens(features),
                patches=features.patches,
                aux=features.aux,
                consistency=torch.stack(features.attention).mean(0) if consistency else None,
            )

    def classify(self, images: Tensor) -> Tensor:
        """Class logits (B, K)."""
        patches = self._features(images).patches
        with _exact(images):
            return self.classifier(F.adaptive_max_pool2d(patches, 1)).flatten(1)

    def coarse_maps(self, images: Tensor, kinds: Collection[str]) -> dict[str, Tensor]:
        """Maps of one forward, (B, K, h, w): CAM and auxiliary CAM, the classifiers on every patch (Zhou et al., CVPR
        2016); LAM, the localization attention map, patch features times class tokens; (B, K+1, h, w): segmentation."""
        features = self._features(images)
        return {kind: self._of_features(kind, features) for kind in kinds}

    def cams_of(self, patches: Tensor, aux: Tensor) -> dict[str, Tensor]:
        """CAM and auxiliary CAM of the backbone's maps."""
        with _exact(patches):
            return {"cam": self.classifier(patches), "cam_aux": self.aux_classifier(aux)}

    def _of_features(self, kind: str, features: ViTFeatures) -> Tensor:
        if kind == "seg":
            return self.decoder(features.patches)
        with _exact(features.patches):
            if kind == "cam":
                return self.classifier(features.patches)
            if kind == "cam_aux":
                return self.aux_classifier(features.aux)
            maps = self._class_tokens(features) @ features.patches.flatten(2)
            return maps.unflatten(2, features.patches.shape[-2:])

    def _features(self, images: Tensor) -> ViTFeatures:
        # compiled in training alone: evaluation has too many sizes
        backbone = self.backbone if self.training else self.backbone.forward
        features = backbone(images)
        return ViTFeatures(*map(full_precision, features[:3]))

    def _features_of_both_views(self, images: Tensor) -> ViTFeatures:
        """Of the images; `attention` has what `mirror_consistency` says of every block."""
        views, count = with_flip(images, True), len(images)
        *maps, attention = self.backbone(views, comparison(self.backbone, images))
        return ViTFeatures(*(full_precision(values[:count]) for values in maps), attention)

    def _class_tokens(self, features: ViTFeatures) -> Tensor:
        return self.gcr(features.class_tokens, features.patches.flatten(2).transpose(1, 2))


def _exact(x: Tensor) -> torch.autocast:
    """No autocast within it: bf16 logits around -3 have steps of 1/64, too coarse to tell patches apart, and GCR takes
    the softmax of products of sums over D."""
    return torch.autocast(x.device.type, enabled=False)
