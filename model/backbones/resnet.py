"""timm's ResNets with dilated stages, as DeepLab takes them, in torchvision's form or in Caffe's."""

from collections.abc import Mapping, Sequence
from typing import Any

import timm
import torch
from timm.models.resnet import Bottleneck, ResNet
from torch import Tensor, nn

from model.backbones.start_weights import check_keys
from model.backbones.vit import to_statistics
from model.batch_norm import FrozenBatchNorm, SyncBatchNorm
from utils.errors import UserError, did_you_mean
from utils.images import MEAN, STD

CAFFE_MEAN = (122.675, 116.669, 104.008)   # RGB of 0..255 [kazuto1011]
DILATIONS = {8: (1, 1, 2, 4), 16: (1, 1, 1, 2)}   # of the stages, by output stride
HEAD, COUNTER = "fc.", ".num_batches_tracked"   # of an image classifier's file; left out of old ones


class DilatedResNet(nn.Module):
    """Images (B, 3, H, W), normalised -> maps of the first stage (B, C, H/4, W/4) and of the last, at output_stride.

    name, args: a ResNet of timm and its keyword arguments. output_stride: 8 or 16; later stages are dilated instead.
    caffe: as in the DeepLab authors' files: blocks stride in their first 1x1 convolution, every 3x3 of a stage has the
    stage's dilation, the first pooling rounds up, and images are RGB of 0..255 minus CAFFE_MEAN; else as torchvision's.
    frozen: batch norm neither counts nor learns; else its statistics are over all processes.
    Raises UserError for another network.
    """

    def __init__(
        self, name: str, args: Mapping[str, Any], output_stride: int, caffe: bool, frozen: bool,
        timm_statistics: bool = False,
    ) -> None:
        super().__init__()
        norm = FrozenBatchNorm if frozen else SyncBatchNorm
        resnet = _resnet(name, {**args, "output_stride": output_stride, "norm_layer": norm})
        self.conv1, self.bn1, self.act1, self.maxpool = resnet.conv1, resnet.bn1, resnet.act1, resnet.maxpool
        self.layer1, self.layer2, self.layer3, self.layer4 = resnet.layer1, resnet.layer2, resnet.layer3, resnet.layer4
        self.low_channels, self.channels = (resnet.feature_info[stage]["num_chs"] for stage in (1, 4))
        if caffe:
            self._in_caffes_form(name, DILATIONS[output_stride])
        statistics = _to_caffe() if caffe else to_statistics(resnet.pretrained_cfg) if timm_statistics else None
        self.register_buffer("statistics", statistics, persistent=False)

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
        if self.statistics is not None:
            gain, shift = self.statistics
            images = images * gain + shift
        low = self.layer1(self.maxpool(self.act1(self.bn1(self.conv1(images)))))
        return low, self.layer4(self.layer3(self.layer2(low)))

    def load_start_weights(self, weights: dict[str, Tensor]) -> None:
        """Weights under torchvision's names, which are timm's; the classifier is left out.

        Raises UserError naming the first missing, unexpected or misshaped key.
        """
        own = self.state_dict()
        weights = {key: value for key, value in weights.items() if not key.startswith(HEAD)}
        weights = with_counters(weights, own)
        check_keys(weights, {key: tuple(value.shape) for key, value in own.items()}, "start weights")
        self.load_state_dict(weights)

    def _in_caffes_form(self, name: str, dilations: Sequence[int]) -> None:
        self.maxpool.ceil_mode = True
        stages = self.layer1, self.layer2, self.layer3, self.layer4
        for stage, dilation in zip(stages, dilations, strict=True):
            for block in stage:
                if not isinstance(block, Bottleneck) or not isinstance(self.conv1, nn.Conv2d):
                    raise UserError(f"model.variant=caffe: {name} is no plain ResNet of bottlenecks, such as resnet101")
                block.conv1.stride, block.conv2.stride = block.conv2.stride, (1, 1)
                block.conv2.dilation = block.conv2.padding = (dilation, dilation)


def with_counters(weights: dict[str, Tensor], own: dict[str, Tensor]) -> dict[str, Tensor]:
    """The weights with the counters of batch norm, which old files lack, of our own state dict."""
    return {**{key: value for key, value in own.items() if key.endswith(COUNTER)}, **weights}


def _resnet(name: str, args: dict[str, Any]) -> ResNet:
    try:
        network = timm.create_model(name, pretrained=False, num_classes=0, global_pool="", **args)
    except (RuntimeError, TypeError, ValueError, AssertionError) as error:
        known = "" if timm.is_model(name) else did_you_mean(name, timm.list_models("resnet*"))
        raise UserError(f"model.backbone={name}: no ResNet such as resnet101{known}; timm says: {error}") from None
    if not isinstance(network, ResNet) or not isinstance(network.maxpool, nn.MaxPool2d):
        raise UserError(f"model.backbone={name}: no ResNet such as resnet101, timm makes a {type(network).__name__}")
    return network


def _to_caffe() -> Tensor:
    """(2, 3, 1, 1): gain and shift from images normalised with ImageNet's mean and std to those of Caffe, in RGB."""
    mean, std, own = map(torch.tensor, (MEAN, STD, CAFFE_MEAN))
    return torch.stack([255 * std, 255 * mean - own])[..., None, None]
