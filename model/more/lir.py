"""Localization-informed Regularization (MoRe, section 3.3) and the contrast between class tokens."""

import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from model.losses.ratio import local_ratio
from model.pseudo_labels import Present
from utils.images import IGNORE

EPS = 1e-4
WINDOW = 6                      # side of the window around a candidate of the uncertain loss
LAST = torch.iinfo(torch.int64).max
MIN_WINDOW_SUM = 1.2 * WINDOW**2   # of codes: 2 foreground, 1 uncertain, 0 background


def token_loss(class_tokens: Tensor, temperature: float = 0.07) -> Tensor:
    """Keeps the class tokens of an image apart: cross entropy of their cosine Gram matrix with the identity.

    class_tokens: (B, K, D). Returns a scalar.
    """
    x = F.normalize(class_tokens, dim=-1)
    logits = x @ x.transpose(1, 2) / temperature
    target = torch.arange(logits.shape[1], device=logits.device).expand(len(logits), -1)
    return F.cross_entropy(logits.flatten(0, 1), target.flatten())


def certain_loss(
    class_tokens: Tensor,
    patches: Tensor,
    token_labels: Tensor,
    present: Present,
    temperature: float,
    valid: Tensor | None = None,
) -> Tensor:
    """Pulls each present class token to the tokens its map is certain of (MoRe, L_cre). Gradient: class tokens only.

    class_tokens (B, K, D); patches (B, D, h, w), not normalised; token_labels (B, h, w), 255 ignored;
    valid: bool (B, h, w), False for tokens on padding, None for all valid.
    -log(exp l / (sum exp l + 1e-4)) is evaluated as log-sum-exp with log 1e-4 as one more entry: finite for any l.
    """
    classes = present.classes
    chosen = class_tokens.gather(1, classes.unsqueeze(-1).expand(-1, -1, class_tokens.shape[-1]))
    logits = F.normalize(chosen, dim=-1) @ patches.detach().flatten(2) / temperature                   # (B, M, N)
    among = logits if valid is None else logits.masked_fill(~valid.flatten(1).unsqueeze(1), -torch.inf)
    negative_log = F.pad(among, (0, 1), value=math.log(EPS)).logsumexp(-1, keepdim=True) - logits
    certain = (token_labels.flatten(1).unsqueeze(1) == (classes + 1).unsqueeze(-1)) & present.there.unsqueeze(-1)
    return ((negative_log * certain).sum(-1) / (certain.sum(-1) + EPS)).sum(1).mean()


class Samples(NamedTuple):
    """The tokens the uncertain loss uses: index int64 (B, T), row * w + column; weight float (B, T), 0 for none."""

    index: Tensor
    weight: Tensor

    def counts(self, grid: Sequence[int]) -> Tensor:
        """How often each token of the grid (h, w) is used, (B, h, w)."""
        zeros = self.weight.new_zeros(len(self.weight), grid[0] * grid[1])
        return zeros.scatter_add(1, self.index, self.weight).unflatten(1, tuple(grid))


def uncertain_loss(
    class_tokens: Tensor, patches: Tensor, samples: Samples, labels: Tensor, ratio: Callable = local_ratio
) -> Tensor:
    """Pushes uncertain patches to the present class tokens and away from the absent ones (MoRe, L_ure).

    Gradient: patches only. class_tokens (B, K, D); patches (B, D, h, w); samples: of `sample_uncertain`; labels (B, K).
    Without a sample the loss is 0.
    """
    count = labels.sum(1, keepdim=True)
    pull = (1 - labels) / (labels.shape[1] - count + 1) - labels / (count + 1)                            # (B, K)
    tokens = patches.flatten(2).transpose(1, 2)                                                           # (B, N, D)
    sampled = tokens.gather(1, samples.index.unsqueeze(2).expand(-1, -1, tokens.shape[2]))                # (B, T, D)
    sampled = F.normalize(sampled, dim=2).transpose(1, 2)
    similarity = torch.bmm(F.normalize(class_tokens.detach(), dim=-1), sampled).abs()                     # (B, K, T)
    losses = 0.5 * torch.bmm(pull.unsqueeze(1), similarity).squeeze(1) + 0.5                              # (B, T)
    return ratio((losses * samples.weight).sum(), samples.weight.sum().clamp(min=1e-12), eps=0)


def hashed_order(seeds: Tensor, count: int) -> Tensor:
    """A random order (B, count) that depends on each sample's seed alone: int64 hashes of (seed, position)."""
    x = seeds[:, None] * 0x1E3779B97F4A7C15 + torch.arange(count, device=seeds.device) * 0x2545F4914F6CDD1D
    for shift in (31, 29):
        x = (x ^ (x >> shift)) * 0x3F58476D1CE4E5B9   # overflows alike on every device
    return x


def sample_uncertain(
    token_labels: Tensor,
    order: Callable[[Tensor, int], Tensor],
    seeds: Tensor,
    count: int = 8,
    valid: Tensor | None = None,
) -> Samples:
    """The tokens of each image that the uncertain loss uses.

    A position of the inner (h-6, w-6) area is a candidate when the middle of its 6x6 window is uncertain (255)
    and the window is mostly foreground. More than `count` candidates: the first `count` in `order`. Fewer, n:
    all, and (count - n) // 4 foreground tokens of the inner area (any, where those are too few). The token used
    lies 3 up and 3 left of the tested position, as released.

    token_labels (B, h, w); order: (seeds (B,), n) -> (B, n) int64, of n inner tokens the smaller the earlier;
    valid: bool (B, h, w) or None.
    Grids with 6 or fewer tokens along a side have no inner area and give no samples.
    """
    batch, h, w = token_labels.shape
    if h <= WINDOW or w <= WINDOW:
        return Samples(seeds.new_zeros(batch, 0, dtype=torch.int64), torch.zeros(batch, 0, device=seeds.device))
    rows, columns, half = h - WINDOW, w - WINDOW, WINDOW // 2
    valid = torch.ones_like(token_labels, dtype=torch.bool) if valid is None else valid
    positive = token_labels > 0
    code = (positive.float() + (positive & (token_labels != IGNORE))) * valid
    window_sum = F.avg_pool2d(code, WINDOW, stride=1, divisor_override=1)[:, :rows, :columns]
    middle, usable = code[:, half:-half, half:-half], valid[:, :rows, :columns]
    candidate, foreground = (middle == 1) & (window_sum >= MIN_WINDOW_SUM) & usable, (middle == 2) & usable
    more = ((count - candidate.sum((1, 2))) // 4).clamp(min=0)
    enough = foreground.sum((1, 2)) >= more
    pool = torch.where(enough[:, None, None], foreground, usable)
    masks = torch.stack([candidate, pool], 1).flatten(2)                          # (B, 2, n)
    rank = order(seeds, rows * columns).unsqueeze(1).masked_fill(~masks, LAST)
    value, inner = rank.topk(min(count, rows * columns), largest=False)           # (B, 2, T)
    most = F.pad(more[:, None], (1, 0), value=count).unsqueeze(2)
    used = (value < LAST) & (torch.arange(inner.shape[2], device=inner.device) < most)
    index = inner + inner.div(columns, rounding_mode="floor") * WINDOW            # of the inner area -> of all tokens
    return Samples(index.flatten(1), used.flatten(1).float())
