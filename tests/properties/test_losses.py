"""Every loss against loops over pixels, pairs and classes, in double precision, whatever the labels."""

import math
from itertools import combinations

import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st

from benchmarks.baselines.plain_step import plain_certain_loss, plain_uncertain_loss
from model.afa.affinity import affinity_loss
from model.deeplab.method import reduced
from model.losses.affinity import ptc_loss
from model.losses.consistency import mirror_consistency
from model.losses.energy import energy_loss
from model.losses.segmentation import pixel_cross_entropy, segmentation_loss
from model.more.gcr import GraphCategoryRepresentation
from model.more.lir import EPS, certain_loss, hashed_order, sample_uncertain, token_loss, uncertain_loss
from model.pseudo_labels import present_first
from tests.bilateralfilter.slow import image_features, slow_filter
from tests.model.test_acr import plain_consistency
from tests.model.test_afa import plain_loss
from tests.model.test_more_losses import outputs, plain_gcr, selected_slowly
from tests.properties.strategies import cases, examples
from utils.images import IGNORE, denormalize

DIM = 6
temperatures = st.floats(0.05, 1)
saturations = st.sampled_from([1.0, 80.0, 1e4])


def same(ours, theirs, rtol=1e-9, atol=1e-12):
    torch.testing.assert_close(ours.double(), torch.as_tensor(theirs, dtype=torch.float64), rtol=rtol, atol=atol)


def same_gradient(ours, theirs, leaf, rtol=1e-9, atol=1e-12):
    """theirs: a number where no gradient flows."""
    own, other = (
        torch.autograd.grad(value, leaf, retain_graph=True)[0] if torch.is_tensor(value) and value.requires_grad
        else torch.zeros_like(leaf) for value in (ours, theirs)
    )
    same(own, other, rtol, atol)


def minus_log(column, label):
    top = max(column)
    return top + math.log(sum(math.exp(value - top) for value in column)) - column[label]


@examples
@given(cases(7), saturations)
def test_cross_entropies_by_pixels(case, factor):
    labels, losses = case.ids(), {True: [], False: []}
    logits = factor * case.normal(case.batch, case.classes + 1, *case.size)
    for column, label in zip(logits.movedim(1, -1).flatten(0, 2).tolist(), labels.flatten().tolist(), strict=True):
        if label != IGNORE:
            losses[label == 0].append(minus_log(column, label))
    together = losses[True] + losses[False]
    same(pixel_cross_entropy(logits, labels), sum(together) / max(len(together), 1))
    parts = (0.5 * sum(part) / (len(part) + 1e-6) for part in losses.values())
    same(segmentation_loss(logits, labels), sum(parts), 1e-6)   # its counts are fp32


@examples
@given(st.integers(1, 250), st.integers(1, 250))
def test_masks_are_reduced_to_what_lies_under_the_centres(side, small):
    """In exact arithmetic; where a centre lies on a border, to either side of it."""
    small = min(side, small)
    ramp = torch.arange(side).byte().view(1, side, 1)
    for mask, size in ((ramp, (small, 1)), (ramp.transpose(1, 2), (1, small))):
        for index, found in enumerate(reduced(mask, size).flatten().tolist()):
            under, rest = divmod((2 * index + 1) * side, 2 * small)
            assert found == under or (rest == 0 and found == under - 1)


@examples
@given(cases(5))
def test_ptc_by_pairs(case):
    patches, labels = case.normal(case.batch, DIM, *case.size), case.ids()
    found = {True: [], False: []}
    for image, label in zip(patches.flatten(2).transpose(1, 2), labels.flatten(1).tolist(), strict=True):
        for one, two in combinations(range(len(label)), 2):
            if IGNORE not in (label[one], label[two]):
                cosine = abs(float(image[one] @ image[two] / image[one].norm() / image[two].norm()))
                found[label[one] == label[two]] += [cosine, cosine]
    positive, negative = (sum(values) / (len(values) + 1) for values in (found[True], found[False]))
    same(ptc_loss(patches, labels), 0.5 * (1 - positive) + 0.5 * negative)


@examples
@given(cases(1), temperatures)
def test_token_loss_by_classes(case, temperature):
    tokens = case.normal(case.batch, case.classes, DIM)
    losses = []
    for image in tokens:
        units = [token / token.norm() for token in image]
        rows = [[float(one @ two) / temperature for two in units] for one in units]
        losses += [minus_log(row, index) for index, row in enumerate(rows)]
    same(token_loss(tokens, temperature), sum(losses) / len(losses))


@examples
@given(cases(6), temperatures, st.booleans())
def test_certain_loss_is_that_of_the_valid_tokens(case, temperature, padded):
    assert EPS == 1e-4   # which the plain one shares
    tokens = case.normal(case.batch, case.classes, DIM).requires_grad_()
    patches, ids, hot = case.normal(case.batch, DIM, *case.size), case.ids(), case.multi_hot()
    valid = case.valid() if padded else None
    kept = torch.ones_like(ids, dtype=torch.bool) if valid is None else valid
    ids = ids.masked_fill(~kept, IGNORE)
    ours = certain_loss(tokens, patches, ids, present_first(hot), temperature, valid)
    theirs = 0
    for token, patch, label, own, one in zip(tokens, patches, ids, hot, kept, strict=True):
        of_image = outputs(token[None], patch[:, one][None, :, :, None])
        theirs = theirs + plain_certain_loss(of_image, label[one][None, :, None], own[None], temperature) / case.batch
    same(ours, theirs)
    same_gradient(ours, theirs, tokens, atol=1e-10)


@examples
@given(cases(13, least=5), st.integers(1, 12))
def test_uncertain_loss_by_tokens(case, count):
    """The sampled tokens, too; most labels are unsure, and grids of 6 or less have no sample."""
    patches = case.normal(case.batch, DIM, *case.size).requires_grad_()
    tokens, hot, seeds = case.normal(case.batch, case.classes, DIM), case.multi_hot(), case.integers(0, 99, case.batch)
    labels, valid = case.ids(), case.valid() | bool(case.seed % 2)
    labels = labels.masked_fill(case.uniform(*labels.shape) < 0.6, IGNORE)
    samples = sample_uncertain(labels, hashed_order, seeds, count, valid)
    order = hashed_order(seeds, max(case.size[0] - 6, 0) * max(case.size[1] - 6, 0))
    slow = [selected_slowly(label, own, count, inside)
            for label, own, inside in zip(labels, order, valid, strict=True)]
    counted = torch.zeros(case.batch, *case.size)
    for image, places in enumerate(slow):
        for place in places:
            counted[(image, *place)] += 1
    assert torch.equal(samples.counts(case.size), counted)
    ours = uncertain_loss(tokens, patches, samples, hot)
    theirs = plain_uncertain_loss(outputs(tokens, patches), slow, hot)
    same(ours, theirs, 1e-6)   # its weights are fp32
    same_gradient(ours, theirs, patches, 1e-6, 1e-9)


@examples
@given(cases(5, batch=2), st.integers(0, 6))
def test_affinity_loss_by_pairs(case, radius):
    count, labels = case.size[0] * case.size[1], case.ids()
    affinity = case.uniform(case.batch, count, count).requires_grad_()
    ours, theirs = affinity_loss(affinity, labels, case.classes, radius), plain_loss(affinity, labels, radius)
    same(ours, theirs)
    same_gradient(ours, theirs, affinity)


@examples
@given(cases(4, batch=2), st.integers(0, 3), st.booleans())
def test_mirror_consistency_by_pairs(case, registers, with_classes):
    classes = min(case.classes, 9) if with_classes else 0
    prefix = registers + classes
    count = prefix + case.size[0] * case.size[1]
    maps = case.normal(2 * case.batch, 2, count, count).softmax(-1).requires_grad_()
    own = range(registers, prefix)
    ours = mirror_consistency(maps, case.size, slice(registers, prefix) if classes else None)
    if not classes:
        assert ours[0] == 0
        own = range(1)
    theirs = torch.stack(plain_consistency(maps, case.size, prefix, own))
    for which in range(0 if classes else 1, 2):
        same(ours[which], theirs[which], 1e-5, 1e-7)
        same_gradient(ours[which], theirs[which], maps, 1e-5, 1e-7)


@examples
@given(cases(1, batch=1), st.sampled_from([0.2, 0.5, 1.0]))
def test_gcr_by_classes(case, ratio):
    """Also with one class, which has no neighbour then."""
    torch.manual_seed(case.seed)
    layer = GraphCategoryRepresentation(DIM, ratio).double()
    tokens, patches = case.normal(case.batch, case.classes, DIM), case.normal(case.batch, 5, DIM)
    same(layer(tokens, patches), plain_gcr(layer, tokens, patches))


@examples
@given(cases(5, batch=2), st.sampled_from([0.3, 0.5, 1.0]), st.booleans(), saturations)
def test_energy_by_the_slow_filter(case, scale, padded, factor):
    """Value and the gradient that is defined for it, at the size that the loss works in; sides of one pixel, too."""
    labels, valid = case.ids(), case.valid() if padded else None
    logits = (factor * case.normal(case.batch, case.classes + 1, *case.size)).requires_grad_()
    images = case.normal(case.batch, 3, *case.size).float()
    ours = energy_loss(logits, images, labels, 1e-2, 40.0, 7.3, scale, valid)
    size = [max(1, math.floor(side * scale)) for side in case.size]
    probability = F.interpolate(logits.softmax(1), size, mode="bilinear")
    pixels = F.interpolate(denormalize(images), size, mode="nearest").double()
    unlabelled = F.interpolate(labels[:, None].float(), size, mode="nearest")[:, 0] == IGNORE
    inside = torch.ones_like(unlabelled)
    if padded:
        outside = (~valid)[:, None].float()
        inside = ~((F.interpolate(outside, size, mode="bilinear") > 0) | (F.interpolate(outside, size) > 0))[:, 0]
    value, gradient = 0.0, torch.zeros_like(probability)
    for image, own in enumerate(inside):
        places, at = own.nonzero().tolist(), own.flatten()
        features = image_features(pixels[image], 40.0, 7.3 * scale)[at]
        weights = [slow_filter(features, one) for one in torch.eye(len(features), dtype=torch.float64)]
        maps = probability[image].detach().flatten(1)[:, at]
        for index, (y, x) in enumerate(places):
            filtered = sum(weights[other][index] * maps[:, other] for other in range(len(places)))
            gate = 1.0 if unlabelled[image, y, x] else 1 - float(maps[:, index].max())
            value += float((maps[:, index] * filtered).sum()) * gate
            gradient[image, :, y, x] = 2 * gate * filtered
    same(ours, -1e-2 * value / case.batch, 1e-4, 1e-7)
    (own,) = torch.autograd.grad(ours, logits)
    (theirs,) = torch.autograd.grad(probability, logits, -1e-2 * gradient / case.batch)
    same(own, theirs, 1e-3, 1e-6)
