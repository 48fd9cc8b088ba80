"""The decoders of DeepLab v2 (Chen et al., TPAMI 2018) and v3+ (Chen et al., ECCV 2018)."""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from model.batch_norm import SyncBatchNorm
from model.multi_scale import resize

RATES = (6, 12, 18, 24)   # paper of v2


class SummedASPP(nn.Module):
    """DeepLab v2's ASPP-L: (B, C, h, w) -> logits (B, K+1, h, w), the sum of 3x3 convolutions of these dilations."""

    def __init__(self, in_channels: int, out_channels: int, rates: Sequence[int] = RATES) -> None:
        super().__init__()
        self.branches = nn.ModuleList(
            nn.Conv2d(in_channels, out_channels, 3, padding=rate, dilation=rate) for rate in rates
        )
        for branch in self.branches:
            nn.init.normal_(branch.weight, std=0.01)
            nn.init.zeros_(branch.bias)

    def forward(self, low: Tensor, x: Tensor) -> Tensor:
        """low: not used."""
        return torch.stack([branch(x) for branch in self.branches]).sum(0)


class DeepLabV3PlusHead(nn.Module):
    """ASPP with image pooling, then a decoder that sees the first stage: logits (B, K+1, h, w) at the size of `low`.

    dilations: 6, 12, 18 at output stride 16, twice that at 8.
    """

    def __init__(
        self, low_channels: int, in_channels: int, out_channels: int, output_stride: int, channels: int = 256,
        low_reduced: int = 48,
    ) -> None:
        super().__init__()
        rates = [rate * 16 // output_stride for rate in (6, 12, 18)]
        self.branches = nn.ModuleList([
            _conv(in_channels, channels, 1), *(_conv(in_channels, channels, 3, rate) for rate in rates)
        ])
        self.pooled = nn.Sequential(nn.AdaptiveAvgPool2d(1), _conv(in_channels, channels, 1))
        self.project = nn.Sequential(_conv(channels * 5, channels, 1), nn.Dropout(0.5))
        self.low = _conv(low_channels, low_reduced, 1)
        self.fuse = nn.Sequential(_conv(channels + low_reduced, channels, 3), _conv(channels, channels, 3))
        self.classifier = nn.Conv2d(channels, out_channels, 1)

    def forward(self, low: Tensor, x: Tensor) -> Tensor:
        parts = [branch(x) for branch in self.branches]
        parts.append(self.pooled(x).expand_as(parts[0]))
        x = resize(self.project(torch.cat(parts, 1)), low.shape[-2:])
        return self.classifier(self.fuse(torch.cat([x, self.low(low)], 1)))


def _conv(in_channels: int, out_channels: int, size: int, dilation: int = 1) -> nn.Sequential:
    padding = dilation * (size // 2)
    convolution = nn.Conv2d(in_channels, out_channels, size, padding=padding, dilation=dilation, bias=False)
    return nn.Sequential(convolution, SyncBatchNorm(out_channels), nn.ReLU())
