"""The losses of MoRe against slow, obvious loops; padding; odd cases."""

import pytest
import torch
import torch.nn.functional as F

from model.losses.affinity import ptc_loss
from model.more.lir import certain_loss, hashed_order, sample_uncertain, uncertain_loss
from model.more.network import Outputs
from model.pseudo_labels import present_first

B, K, D, H, W = 3, 5, 8, 9, 11


@pytest.fixture
def random():
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randn(B, K, D, generator=generator)
    patches = torch.randn(B, D, H, W, generator=generator) * 3
    mask = torch.randint(0, K + 2, (B, H, W), generator=generator)
    mask[mask == K + 1] = 255
    labels = (torch.rand(B, K, generator=generator) < 0.6).float()
    return tokens, patches, mask, labels


def outputs(tokens, patches):
    return Outputs(*(None,) * 3, class_tokens=tokens, patches=patches, aux=None)


def in_order(seeds, count):
    return torch.arange(count).expand(len(seeds), -1)


def test_certain_stays_finite(random):
    tokens, patches, mask, labels = random
    for factor in (1e3, -1e3, 0.0):
        leaf = tokens.clone().requires_grad_()
        loss = certain_loss(leaf, patches * factor, mask, present_first(labels), 0.1)
        loss.backward()
        assert loss.isfinite() and leaf.grad.isfinite().all()


def selected_slowly(mask, priority, count, valid):
    """The sampling rule, token by token; returns the list of tokens used in one image."""
    code = {255: 1, 0: 0}
    rows, columns = mask.shape
    cell = [[code.get(int(mask[y, x]), 2) if valid[y, x] else 0 for x in range(columns)] for y in range(rows)]
    inner = [(y, x) for y in range(rows - 6) for x in range(columns - 6)]
    rank = {place: int(priority[i]) for i, place in enumerate(inner)}
    usable = [(y, x) for y, x in inner if valid[y, x]]
    window = {(y, x): sum(cell[y + i][x + j] for i in range(6) for j in range(6)) for y, x in inner}
    found = [p for p in usable if cell[p[0] + 3][p[1] + 3] == 1 and window[p] >= 43.2]
    found.sort(key=rank.get)
    if len(found) > count:
        return found[:count]
    more = (count - len(found)) // 4
    pool = [p for p in usable if cell[p[0] + 3][p[1] + 3] == 2]
    pool = pool if len(pool) >= more else usable
    return found + sorted(pool, key=rank.get)[:more]


@pytest.mark.parametrize("share", [0.0, 0.1, 0.5, 0.9, 1.0])
@pytest.mark.parametrize("padded", [False, True])
def test_sampling_by_tokens(share, padded):
    generator = torch.Generator().manual_seed(int(10 * share))
    mask = torch.randint(1, 4, (4, 13, 15), generator=generator)
    mask[torch.rand(mask.shape, generator=generator) < share] = 255
    mask[torch.rand(mask.shape, generator=generator) < 0.05] = 0
    valid = torch.ones_like(mask, dtype=torch.bool)
    if padded:
        valid[:, :, 11:] = False
    seeds = torch.tensor([5, 6, 7, 8])
    weights = sample_uncertain(mask, hashed_order, seeds, 8, valid).counts((13, 15))
    for b in range(4):
        expected = torch.zeros(13, 15)
        for y, x in selected_slowly(mask[b], hashed_order(seeds, 7 * 9)[b], 8, valid[b]):
            expected[y, x] += 1
        assert torch.equal(weights[b], expected)
        assert not weights[b][~valid[b]].any()


@pytest.mark.parametrize("size", [(6, 6), (1, 1), (6, 20), (20, 5)])
def test_small_grids_have_no_uncertain_loss(size):
    mask = torch.full((2, *size), 255)
    samples = sample_uncertain(mask, hashed_order, torch.tensor([1, 2]))
    patches = torch.randn(2, D, *size, requires_grad=True)
    loss = uncertain_loss(torch.randn(2, K, D), patches, samples, torch.ones(2, K))
    loss.backward()
    assert loss.item() == 0 and not patches.grad.any()


def test_hashed_order_depends_on_the_seed_alone():
    first = hashed_order(torch.tensor([3, 4]), 50)
    assert torch.equal(first[1], hashed_order(torch.tensor([4]), 50)[0])
    assert not torch.equal(first[0], first[1])
    places = hashed_order(torch.arange(2000), 10).argmin(1)   # every place comes first about equally often
    assert (torch.bincount(places, minlength=10) - 200).abs().max() < 60


def test_padding_changes_no_loss(random):
    """Whatever stands on padded tokens: the same values, and no gradient there."""
    tokens, patches, mask, labels = random
    valid = torch.ones(B, H, W, dtype=torch.bool)
    valid[..., 8:] = False
    mask = mask.masked_fill(~valid, 255)
    results = []
    for filler in (0.0, 50.0):
        leaf = patches.masked_fill(~valid.unsqueeze(1), filler).requires_grad_()
        samples = sample_uncertain(mask, in_order, torch.zeros(B), 8, valid)
        losses = [
            ptc_loss(leaf, mask), certain_loss(tokens, leaf, mask, present_first(labels), 0.5, valid),
            uncertain_loss(tokens, leaf, samples, labels),
        ]
        (losses[0] + losses[2]).backward()
        assert not leaf.grad[..., 8:].any()
        results.append([loss.item() for loss in losses])
    assert results[0] == pytest.approx(results[1], rel=1e-6)


def test_a_batch_without_labels(random):
    tokens, patches, mask, _ = random
    none = torch.zeros(B, K)
    assert certain_loss(tokens, patches, mask, present_first(none), 0.5).item() == 0
    samples = sample_uncertain(mask, in_order, torch.zeros(B))
    assert uncertain_loss(tokens, patches, samples, none).isfinite()


def plain_gcr(layer, class_tokens, patches):
    """Image by image and class by class."""
    results = []
    for c, own in zip(class_tokens, patches, strict=True):
        head, tail = layer.head_proj(c), layer.tail_proj(torch.cat([c, own]))
        for k in range(len(c)):
            score = tail @ head[k] / c.shape[1]**0.5
            value, index = score.topk(int(layer.ratio * len(c)))
            n, p = tail[index], value.softmax(0)[:, None]
            gate = torch.tanh(head[k] + (1 - p) * head[k] + p * n)
            a = (n.sum(1) * gate.sum(1)).softmax(0)[:, None]
            m = (a * n).sum(0)
            plus = F.leaky_relu(layer.linear1((head[k] + m) * 0.1 + c[k]))
            times = F.leaky_relu(layer.linear2(head[k] * m * 0.1 + c[k]))
            results.append(layer.norm(plus + times))
    return torch.stack(results).unflatten(0, class_tokens.shape[:2])
