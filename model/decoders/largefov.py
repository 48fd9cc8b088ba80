"""LargeFOV, the segmentation decoder of DeepLab v1 (Chen et al., ICLR 2015)."""

from torch import Tensor, nn


class LargeFOV(nn.Module):
    """(B, D, h, w) patch map -> (B, K+1, h, w) logits: two dilated 3x3 convolutions and a 1x1, no biases."""

    def __init__(self, in_channels: int, channels: int, out_channels: int, dilation: int = 5) -> None:
        super().__init__()
        self.conv6 = nn.Conv2d(in_channels, channels, 3, padding=dilation, dilation=dilation, bias=False)
        self.conv7 = nn.Conv2d(channels, channels, 3, padding=dilation, dilation=dilation, bias=False)
        self.conv8 = nn.Conv2d(channels, out_channels, 1, bias=False)

    def forward(self, patches: Tensor) -> Tensor:
        return self.conv8(self.conv7(self.conv6(patches).relu()).relu())
