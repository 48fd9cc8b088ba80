"""The network of AFA: Mix Transformer, classifier, affinity head and SegFormer's decoder."""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from model.afa.affinity import Affinity, AffinityHead
from model.backbones.mit import MiTFeatures, MixTransformer
from model.decoders.segformer import SegFormerHead
from model.multi_scale import full_precision
from utils.errors import UserError

POOLS = {"max": F.adaptive_max_pool2d, "mean": F.adaptive_avg_pool2d}


class Outputs(NamedTuple):
    """What one forward gives; h w is the grid of the last stage, h_1 w_1 that of the first."""

    class_logits: Tensor            # (B, K)
    seg_logits: Tensor              # (B, K+1, h_1, w_1)
    affinity: Affinity              # of the h*w tokens
    stages: tuple[Tensor, ...]      # maps of the backbone


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

    def forward(self, images: Tensor) -> Outputs:
        features = self.features(images, affinity=True)
        seg_logits = self.decoder(features.stages)
        with torch.autocast(images.device.type, enabled=False):
            return Outputs(
                self.class_logits(features), seg_logits, self.affinity_head(features.attention), features.stages
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
