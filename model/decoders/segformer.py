"""The all-MLP decoder of SegFormer (Xie et al., NeurIPS 2021, section 3.2)."""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from model.batch_norm import SyncBatchNorm
from model.multi_scale import resize


class SegFormerHead(nn.Module):
    """Stage maps (B, C_i, h_i, w_i), large to small -> (B, K+1, h_1, w_1) logits.

    A linear layer brings every stage to `channels`, a second one, without bias, mixes them at the size of the first
    stage; batch norm, ReLU, dropout of whole channels, and a linear classifier follow. in_channels: of the stages.
    """

    def __init__(self, in_channels: Sequence[int], channels: int, out_channels: int, dropout: float = 0.1) -> None:
        super().__init__()
        self.linears = nn.ModuleList(nn.Linear(count, channels) for count in in_channels)
        self.fuse = nn.Conv2d(len(in_channels) * channels, channels, 1, bias=False)
        self.norm = SyncBatchNorm(channels)
        self.dropout = nn.Dropout2d(dropout)
        self.classifier = nn.Conv2d(channels, out_channels, 1)
        nn.init.kaiming_normal_(self.fuse.weight, nonlinearity="relu")

    def forward(self, stages: Sequence[Tensor]) -> Tensor:
        return self.classifier(self.dropout(self.norm(self._mixed(stages)).relu()))

    def count(self, stages: Sequence[Tensor]) -> None:
        """Takes the maps into the running statistics, as a forward in training does."""
        self.norm(self._mixed(stages))

    def _mixed(self, stages: Sequence[Tensor]) -> Tensor:
        """The two linear layers (B, channels, h_1, w_1).

        Nothing lies between them but an enlargement, whose weights sum to 1: so they are one, at each stage's own size,
        and its results are summed before they are enlarged.
        """
        total: dict[tuple[int, ...], Tensor] = {}
        mixes = self.fuse.weight[:, :, 0, 0].chunk(len(stages), 1)[::-1]   # the released order is last stage first
        for stage, linear, mix in zip(stages, self.linears, mixes, strict=True):
            with torch.autocast(stage.device.type, enabled=False):
                weight, bias = mix @ linear.weight, mix @ linear.bias
            part = nn.functional.conv2d(stage, weight[:, :, None, None], bias)
            size = tuple(stage.shape[2:])
            total[size] = total[size] + part if size in total else part
        first = stages[0].shape[2:]
        return sum(resize(part, first) for part in total.values())
