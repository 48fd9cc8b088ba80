"""The network of AFA: Mix Transformer, classifier, affinity head and SegFormer's decoder."""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from model.afa.affinity import Affinity, AffinityHead
from model.backbones.mit import MiTFeatures, MixTransformer
from model.decoders.segformer import SegFormerHead
from model.losses.consistency import mirror_consistency
from model.multi_scale import full_precision, with_flip
from utils.errors import UserError

POOLS = {"max": F.adaptive_max_pool2d, "mean": F.adaptive_avg_pool2d}


class Outputs(NamedTuple):
    """What one forward gives; h w is the grid of the last stage, h_1 w_1 that of the first."""

    class_logits: Tensor            # (B, K)
    seg_logits: Tensor              # (B, K+1, h_1, w_1)
    affinity: Affinity              # of the h*w tokens
    stages: tuple[Tensor, ...]      # maps of the backbone
    consistency: Tensor | None      # of the attention with the mirrors', where it was asked for


class AFANetwork(nn.Module):
    """Images (B, 3, H, W) -> Outputs, and the parts of it that localisation needs.

    name, args, strides, drop_path: of `MixTransformer`, whose last stage has two blocks or more.
    """

    def __init__(
        self, name: str, args: Mapping[str, Any], strides: Sequence[int], num_classes: int, decoder_channels: int = 256,
        pooling: str = "max", drop_path: float = 0.1, dropout: float = 0.1,
    ) -> None:
        super().__init__()
        self.backbone = MixTransformer(name, args, strides, drop_path)
        channels, depths = self.backbone.channels, self.backbone.depths
        if depths[-1] < 2:
            raise UserError(f"model.backbone_args.depths = {list(depths)}: the last stage needs two blocks or more")
        self.attention = (sum(depths) - 2, sum(depths) - 1)   # the blocks whose attention the affinity is made of
        self.pool = POOLS[pooling]
        self.classifier = nn.Conv2d(channels[-1], num_classes, 1, bias=False)
        self.affinity_head = AffinityHead(2 * self.backbone.heads[-1])
        self.decoder = SegFormerHead(channels, decoder_channels, num_classes + 1, dropout)

    def forward(self, images: Tensor, consistency: bool = False) -> Outputs:
        """consistency: whether the mirrors of the images go through the backbone, too, and attentions are compared."""
        features, agreement = self.features(with_flip(images, consistency), affinity=True), None
        if consistency:
            features, agreement = _of_images(features, len(images)), _consistency(features)
        seg_logits = self.decoder(features.stages)
        with torch.autocast(images.device.type, enabled=False):
            return Outputs(
                self.class_logits(features), seg_logits, self.affinity_head(features.attention), features.stages,
                agreement,
            )

    def features(self, images: Tensor, affinity: bool = False) -> MiTFeatures:
        """The backbone's maps, fp32; with the attention that `affinity_head` takes where that is wanted."""
        # compiled in training alone: evaluation has too many sizes
        backbone = self.backbone if self.training else self.backbone.forward
        stages, attention = backbone(images, self.attention if affinity else ())
        return MiTFeatures(tuple(map(full_precision, stages)), attention)

    def class_logits(self, features: MiTFeatures) -> Tensor:
        """(B, K): global pooling, then the classifier."""
        return self.cam(self.pool(features.stages[-1], 1)).flatten(1)

    def cam(self, last_stage: Tensor) -> Tensor:
        """CAM (B, K, h, w): the classifier on every patch."""
        with torch.autocast(last_stage.device.type, enabled=False):
            return self.classifier(last_stage)


def _of_images(views: MiTFeatures, count: int) -> MiTFeatures:
    attention = tuple(raw._replace(q=raw.q[:count], k=raw.k[:count]) for raw in views.attention)
    return MiTFeatures(tuple(stage[:count] for stage in views.stages), attention)


def _consistency(views: MiTFeatures) -> Tensor:
    """The patch-to-patch term of ACR, of the blocks that the affinity is made of; the others' keys are not the patches.
    """
    terms = []
    for raw in views.attention:
        maps = (raw.maps().float() * raw.q.shape[-1] ** -0.5).softmax(-1)
        terms.append(mirror_consistency(maps, raw.grid)[1])
    return torch.stack(terms).mean()
