"""Localization-informed Regularization (MoRe, section 3.3) and the contrast between class tokens."""

import math
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from model.losses.ratio import local_ratio
from utils.images import IGNORE

EPS = 1e-4
WINDOW = 6                      # side of the window around a candidate of the uncertain loss
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
    labels: Tensor,
    temperature: float,
    valid: Tensor | None = None,
) -> Tensor:
    """Pulls each present class token to the tokens its map is certain of (MoRe, L_cre). Gradient: class tokens only.

    class_tokens (B, K, D); patches (B, D, h, w), not normalised; token_labels (B, h, w), 255 ignored;
    labels (B, K); valid: bool (B, h, w), False for tokens on padding, None for all valid.
    -log(exp l / (sum exp l + 1e-4)) is evaluated as log-sum-exp with log 1e-4 as one more entry: finite for any l.
    """
    logits = F.normalize(class_tokens, dim=-1) @ patches.detach().flatten(2) / temperature            # (B, K, N)
    among = logits if valid is None else logits.masked_fill(~valid.flatten(1).unsqueeze(1), -torch.inf)
    floor = among.new_full((*among.shape[:2], 1), math.log(EPS))
    negative_log = torch.cat([among, floor], -1).logsumexp(-1, keepdim=True) - logits
    ids = torch.arange(1, labels.shape[1] + 1, device=labels.device)[:, None]
    certain = (token_labels.flatten(1).unsqueeze(1) == ids) & (labels > 0).unsqueeze(-1)               # (B, K, N)
    return ((negative_log * certain).sum(-1) / (certain.sum(-1) + EPS)).sum(1).mean()


def uncertain_loss(
    class_tokens: Tensor, patches: Tensor, weights: Tensor, labels: Tensor, ratio: Callable = local_ratio
) -> Tensor:
    """Pushes uncertain patches to the present class tokens and away from the absent ones (MoRe, L_ure).

    Gradient: patches only. class_tokens (B, K, D); patches (B, D, h, w); labels (B, K);
    weights (B, h, w): how often each token was sampled (`sample_uncertain`). Without a sample the loss is 0.
    """
    tokens = F.normalize(class_tokens.detach(), dim=-1)
    similarity = (tokens @ F.normalize(patches.flatten(2), dim=1)).abs()     # (B, K, N)
    present = labels.unsqueeze(-1)
    attract = 1 - (similarity * present).sum(1) / (present.sum(1) + 1)
    repel = (similarity * (1 - present)).sum(1) / ((1 - present).sum(1) + 1)
    total = weights.sum()
    return ratio(((0.5 * attract + 0.5 * repel) * weights.flatten(1)).sum(), total.clamp(min=1e-12), eps=0)


def hashed_order(seeds: Tensor, count: int) -> Tensor:
    """A random order (B, count) that depends on each sample's seed alone: int64 hashes of (seed, position)."""
    x = seeds[:, None] * 0x9E3779B1 + torch.arange(count, device=seeds.device) * 0x85EBCA77
    for _ in range(3):
        x = ((x ^ (x >> 15)) * 0x2C1B3C6D) & 0x7FFFFFFF
    return x


def sample_uncertain(
    token_labels: Tensor,
    order: Callable[[Tensor, int], Tensor],
    seeds: Tensor,
    count: int = 8,
    valid: Tensor | None = None,
) -> Tensor:
    """How often each token is used by the uncertain loss, float (B, h, w).

    A position of the inner (h-6, w-6) area is a candidate when the middle of its 6x6 window is uncertain (255)
    and the window is mostly foreground. More than `count` candidates: the first `count` in `order`. Fewer, n:
    all, and (count - n) // 4 foreground tokens of the inner area (any, where those are too few). The token used
    lies 3 up and 3 left of the tested position, as released.

    token_labels (B, h, w); order: (seeds (B,), n) -> (B, n), of n inner tokens the smaller the earlier;
    valid: bool (B, h, w) or None.
    Grids of 6 or fewer tokens a side have no inner area and give zeros.
    """
    batch, h, w = token_labels.shape
    weights = torch.zeros(batch, h, w, device=token_labels.device)
    if h <= WINDOW or w <= WINDOW:
        return weights
    valid = torch.ones_like(token_labels, dtype=torch.bool) if valid is None else valid
    code = torch.where(token_labels == IGNORE, 1.0, torch.where(token_labels == 0, 0.0, 2.0)) * valid
    inner, half = (slice(None), slice(0, h - WINDOW), slice(0, w - WINDOW)), WINDOW // 2
    window_sum = F.avg_pool2d(code.unsqueeze(1), WINDOW, stride=1, divisor_override=1).squeeze(1)[inner]
    tested = (slice(None), slice(half, h - half), slice(half, w - half))
    usable = (valid[tested] & valid[inner]).flatten(1)
    candidate = ((code[tested] == 1) & (window_sum >= MIN_WINDOW_SUM)).flatten(1) & usable
    foreground = (code[tested] == 2).flatten(1) & usable
    order = order(seeds, usable.shape[1])
    found = candidate.sum(1, keepdim=True)
    chosen = _first(candidate, order, torch.full_like(found, count))
    more = ((count - found) // 4).clamp(min=0)
    enough = foreground.sum(1, keepdim=True) >= more
    extra = _first(torch.where(enough, foreground, usable), order, more)
    weights[inner] = (chosen.float() + extra.float()).unflatten(1, (h - WINDOW, w - WINDOW))
    return weights


def _first(mask: Tensor, order: Tensor, count: Tensor) -> Tensor:
    """Of each row's True entries, the `count` (B, 1) with the smallest order. mask: bool (B, n)."""
    rank = order.masked_fill(~mask, torch.iinfo(order.dtype).max).argsort(dim=1, stable=True).argsort(dim=1)
    return mask & (rank < count)
