"""The networks of the second stage: a backbone and one of DeepLab's decoders."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from model.backbones.resnet import DilatedResNet
from model.backbones.vit import MultiClassTokenViT
from model.decoders.deeplab import DeepLabV3PlusHead, SummedASPP
from model.decoders.largefov import LargeFOV
from model.multi_scale import full_precision, resize


class DeepLabNetwork(nn.Module):
    """Images (B, 3, H, W) -> logits (B, K+1, h, w), at the size that the decoder gives them.

    model: the section of the config.
    """

    def __init__(self, model: Any, num_classes: int) -> None:
        super().__init__()
        self.on_vit = model.architecture == "largefov"
        args = model.backbone, dict(model.backbone_args)
        if self.on_vit:
            self.backbone = MultiClassTokenViT(*args, 1, 0, aux_block=-1, timm_statistics=model.timm_statistics)
            self.decoder = LargeFOV(self.backbone.embed_dim, model.decoder_channels, num_classes + 1)
            return
        caffe, frozen = model.variant == "caffe", model.batch_norm == "frozen"
        self.backbone = DilatedResNet(*args, model.output_stride, caffe, frozen, model.timm_statistics)
        low, channels = self.backbone.low_channels, self.backbone.channels
        if model.architecture == "deeplabv2":
            self.decoder = SummedASPP(channels, num_classes + 1)
        else:
            self.decoder = DeepLabV3PlusHead(low, channels, num_classes + 1, model.output_stride)

    def forward(self, images: Tensor) -> Tensor:
        if self.on_vit:
            return self.decoder(self.backbone(images).patches)
        return self.decoder(*self.backbone(images))

    def of_scales(self, images: Tensor, scales: Sequence[float]) -> list[Tensor]:
        """The logits of the images at each scale and, of several, their maximum at the size of the first (v2)."""
        made = []
        for scale in scales:
            size = [int(side * scale) for side in images.shape[-2:]]
            made.append(full_precision(self(resize(images, size))))
        if len(made) == 1:
            return made
        alike = torch.stack([resize(logits, made[0].shape[-2:]) for logits in made])
        return [*made, alike.amax(0)]
