"""Affinity from attention, its loss, and the random walk that it drives (AFA, sections 3.2 and 3.3)."""

from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from model.backbones.mit import RawAttention
from model.losses.ratio import local_ratio
from model.multi_scale import full_precision

Block = Callable[[slice, slice], Tensor]   # rows and columns of the affinity matrices -> (B, rows, columns)
ROWS_AT_ONCE = 8   # of the token grid, on a CPU


class Affinity(NamedTuple):
    """Predicted affinity of any two of N = h*w tokens, in (0, 1): sigmoid(a + a^T + bias) with a = left right^T.

    left, right: (B, N, C). bias: a number. grid: (h, w).
    """

    left: Tensor
    right: Tensor
    bias: Tensor
    grid: tuple[int, int]

    def full(self) -> Tensor:
        """(B, N, N), symmetric."""
        a = self.left @ self.right.transpose(1, 2)
        return (a + a.transpose(1, 2) + self.bias).sigmoid()

    def block(self, rows: slice, columns: slice) -> Tensor:
        """These rows and columns of it."""
        a = self.left[:, rows] @ self.right[:, columns].transpose(1, 2)
        return a.baddbmm_(self.right[:, rows], self.left[:, columns].transpose(1, 2)).add_(self.bias).sigmoid_()

    def first(self, count: int) -> "Affinity":
        """That of the first images."""
        return self._replace(left=self.left[:count], right=self.right[:count])


class AffinityHead(nn.Conv2d):
    """Attention of some blocks -> Affinity: the maps q.k of all heads, symmetrised, through a 1x1 convolution to one.

    A weighted sum over heads of q.k is one product of long vectors; the maps themselves are never made.
    """

    def __init__(self, heads: int) -> None:
        """heads: of all these blocks together."""
        super().__init__(heads, 1, 1)

    def forward(self, attention: Sequence[RawAttention]) -> Affinity:
        q = torch.cat([full_precision(of_block.q) for of_block in attention], 1)
        k = torch.cat([full_precision(of_block.k) for of_block in attention], 1)
        left = q * self.weight.view(1, -1, 1, 1)
        return Affinity(*(x.transpose(1, 2).flatten(2) for x in (left, k)), self.bias, attention[0].grid)


def affinity_loss(affinity: Tensor, labels: Tensor, num_classes: int, radius: int, ratio=local_ratio) -> Tensor:
    """Pairs of tokens with the same label should be close, those with different labels not (AFA, equations 5 and 6).

    affinity: (B, N, N) in [0, 1]. labels: int (B, h, w) of 0 to num_classes, 255 ignored. Pairs count within `radius`
    (0: all), a token with itself included. Returns a scalar in [0, 1].
    """
    ids = torch.arange(num_classes + 1, device=labels.device)
    one_hot = (labels.flatten(1)[..., None] == ids).to(affinity.dtype)
    sums, counts = _PairSums.apply(affinity, one_hot, labels.shape[1:], radius)
    positive, negative = ratio(torch.stack([counts[0] - sums[0], sums[1]]), counts, eps=1)
    return 0.5 * positive + 0.5 * negative


class _PairSums(torch.autograd.Function):
    """Sums of the affinity over the pairs with the same label and over those with different ones; how many these are.

    With the one-hot labels Y (N, K+1), and k (N) for what is known of them, the pairs with the same label are Y Y^T and
    all are k k^T: sums and gradient are products of narrow matrices, band by band.
    """

    @staticmethod
    def forward(ctx, affinity: Tensor, one_hot: Tensor, grid: Sequence[int], radius: int) -> tuple[Tensor, Tensor]:
        ctx.save_for_backward(one_hot)
        ctx.like, ctx.grid, ctx.radius = affinity, grid, radius
        sums, counts = [], []
        for rows, columns, near in _bands(grid, radius, affinity.device):
            near = near.to(affinity.dtype)
            sums.append(_over_pairs(affinity[:, rows, columns] * near, one_hot[:, rows], one_hot[:, columns]))
            counts.append(_over_pairs(near, one_hot[:, rows], one_hot[:, columns]))
        sums, counts = (torch.stack(of_bands).sum(0) for of_bands in (sums, counts))
        ctx.mark_non_differentiable(counts)
        return sums, counts

    @staticmethod
    @once_differentiable
    def backward(ctx, grad: Tensor, _: Tensor):
        (one_hot,), result = ctx.saved_tensors, torch.zeros_like(ctx.like)
        known = one_hot.sum(2, keepdim=True)
        left = torch.cat([one_hot * (grad[0] - grad[1]), known * grad[1]], 2)
        right = torch.cat([one_hot, known], 2).transpose(1, 2)
        for rows, columns, near in _bands(ctx.grid, ctx.radius, result.device):
            torch.mul(left[:, rows] @ right[:, :, columns], near, out=result[:, rows, columns])
        return result, None, None, None


def _over_pairs(values: Tensor, rows: Tensor, columns: Tensor) -> Tensor:
    """Sums of values (B, n, m) or (n, m) over the pairs with the same label and over those with different ones; rows,
    columns: one-hot (B, n, K+1), (B, m, K+1)."""
    of_classes = values @ columns
    same = (of_classes * rows).sum()
    return torch.stack([same, (of_classes.sum(2) * rows.sum(2)).sum() - same])


def _bands(grid: Sequence[int], radius: int, device: torch.device) -> Iterator[tuple[slice, slice, Tensor]]:
    """The pairs of tokens within `radius`, in parts: rows and columns of the (h*w, h*w) matrix of pairs, and which of
    these are near, bool (rows, columns). On a CPU the columns are some rows of the grid, and the rows what is around
    them; on a GPU there is one part."""
    h, w = grid
    radius = radius or max(grid)
    at_once = ROWS_AT_ONCE if device.type == "cpu" else h
    for top in range(0, h, at_once):
        own, around = slice(top, min(top + at_once, h)), slice(max(top - radius, 0), min(top + at_once + radius, h))
        near = near_pairs(grid, radius, device, around, own)
        yield slice(around.start * w, around.stop * w), slice(own.start * w, own.stop * w), near


def near_pairs(
    grid: Sequence[int], radius: int, device: torch.device, rows: slice = slice(None), columns: slice = slice(None)
) -> Tensor:
    """bool (N, N): whether two tokens of the grid lie within `radius` rows and columns of each other.

    rows, columns: which rows of the grid the first and the second token are in.
    """
    y, x = (torch.arange(side, device=device) for side in grid)
    near_y = (y[rows, None] - y[None, columns]).abs() <= radius
    near_x = (x[:, None] - x).abs() <= radius
    return (near_y[:, None, :, None] & near_x[:, None]).flatten(2).flatten(0, 1)


def random_walk(scores: Tensor, block: Block, radius: int, eps: float = 0.1, power: int = 2) -> Tensor:
    """One step of the random walk: every token gets the mean of its neighbours' scores, weighted by affinity^power.

    scores: (B, C, h, w). block: `Affinity.block`, or any other matrix (B, N, N) by its parts; its column j weighs what
    token j gets. Only tokens within `radius` rows and columns count (0: all). eps: added to the sum of the weights.
    """
    flat, walked = scores.flatten(2), []
    for around, own, near in _bands(scores.shape[2:], radius, scores.device):
        weights = (block(around, own) * near) ** power
        walked.append(flat[:, :, around] @ weights / (weights.sum(1, keepdim=True) + eps))
    return torch.cat(walked, 2).unflatten(2, scores.shape[2:])
