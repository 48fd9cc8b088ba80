"""Pseudo labels, PAR and the random walk against loops over pixels and images, whatever the labels and the padding."""

from itertools import product

import torch
from hypothesis import given
from hypothesis import strategies as st

from benchmarks.baselines import plain_afa
from benchmarks.baselines.plain_step import plain_par, plain_pixel_labels
from model.afa.affinity import random_walk
from model.afa.method import scores_with_background
from model.multi_scale import resize
from model.par import par_affinity, par_refine
from model.pseudo_labels import (
    labels_of_two_backgrounds,
    present_first,
    refined_labels,
    threshold,
    token_labels,
    valid_tokens,
)
from tests.model.test_afa import plain_walk
from tests.properties.strategies import cases, examples

VALUES = torch.linspace(0, 1, 9)   # few: many are equal, or exactly a threshold
HIGH, LOW = 0.625, 0.25


@examples
@given(cases(7), st.sampled_from([(HIGH, LOW), (0.5, 0.5), (1.0, 0.0)]))
def test_thresholds_by_pixels(case, sure):
    maps, hot = case.any_of(VALUES, case.batch, case.classes, *case.size), case.multi_hot()
    present = present_first(hot)
    found = threshold(present.of(maps), present, *sure)
    for image, y, x in product(range(case.batch), *map(range, case.size)):
        value, label = 0.0, 0
        for index in hot[image].nonzero().flatten().tolist():
            if float(maps[image, index, y, x]) > value:
                value, label = float(maps[image, index, y, x]), index + 1
        expected = label if value > sure[0] else 255 if value > sure[1] else 0
        assert found[image, y, x] == expected
    grid, maps = [max(1, side // 2) for side in case.size], case.uniform(*maps.shape)   # no ties: rounding decides them
    small = threshold(present.of(resize(maps, grid)), present, *sure)
    assert torch.equal(token_labels(present.of(maps), present, grid, *sure), small)


@examples
@given(cases(7))
def test_two_backgrounds_by_pixels(case):
    hot = case.multi_hot()
    present = present_first(hot)
    shape = case.batch, 1 + present.classes.shape[1], *case.size
    strict, loose = (case.any_of(VALUES, *shape) for _ in range(2))
    found = labels_of_two_backgrounds(strict, loose, present)
    for image, y, x in product(range(case.batch), *map(range, case.size)):
        winners = []
        for scores in (strict, loose):
            column, winner, best = scores[image, :, y, x].tolist(), 0, float(scores[image, 0, y, x])
            for value, there, index in zip(column[1:], present.there[image], present.classes[image], strict=True):
                if there and value > best:
                    winner, best = int(index) + 1, value
            winners.append(winner)
        assert found[image, y, x] == (winners[0] or (255 if winners[1] else 0))


@examples
@given(cases(40), st.integers(1, 9), st.integers(1, 9))
def test_valid_tokens_by_pixels(case, rows, columns):
    valid = case.valid()
    found = valid_tokens(valid, (rows, columns))
    assert found.shape == (case.batch, case.size[0] // rows, case.size[1] // columns)
    for image, y, x in product(*map(range, found.shape)):
        patch = valid[image, y * rows : (y + 1) * rows, x * columns : (x + 1) * columns]
        assert found[image, y, x] == all(patch.flatten().tolist())


@examples
@given(cases(12), st.lists(st.integers(1, 24), min_size=1, max_size=6), st.integers(0, 4), st.booleans())
def test_par_image_by_image(case, dilations, iterations, constant):
    images, maps = case.uniform(case.batch, 3, *case.size).float(), case.uniform(case.batch, 4, *case.size).float()
    images = images[:, :, :1, :1].expand_as(images) if constant else images
    found = par_refine(maps, par_affinity(images, dilations), dilations, iterations)
    for image in range(case.batch):
        one = slice(image, image + 1)
        theirs = plain_par(images[one], maps[one], dilations, iterations)
        torch.testing.assert_close(found[one], theirs, rtol=1e-4, atol=1e-5)


@examples
@given(cases(12), st.integers(0, 3))
def test_refined_labels_image_by_image(case, iterations):
    """Sides of one pixel have no half: the plain formulation knows them not."""
    case.size = tuple(side + 1 for side in case.size)
    images, maps = case.uniform(case.batch, 3, *case.size).float(), case.uniform(case.batch, case.classes, *case.size)
    maps, hot = maps.float(), case.multi_hot().float()
    present, settings = present_first(hot), (HIGH, LOW, (1, 2), iterations)
    found = refined_labels(present.of(maps), present, images, *settings)
    for image in range(case.batch):
        assert torch.equal(found[image], plain_pixel_labels(maps[image], hot[image], images[image], *settings))


@examples
@given(cases(6, batch=2), st.integers(0, 7))
def test_random_walk_by_neighbours(case, radius):
    """Any affinity, not symmetric ones alone; zeros, too."""
    count = case.size[0] * case.size[1]
    scores = case.uniform(case.batch, 1 + case.classes, *case.size)
    matrix = case.uniform(case.batch, count, count) * (case.uniform(case.batch, count, count) < 0.8)

    def block(rows, columns):
        return matrix[:, rows, columns]

    walked = random_walk(scores, block, radius)
    torch.testing.assert_close(walked, plain_walk(scores, matrix, radius, 0.1))


@examples
@given(cases(6), st.integers(1, 7), st.sampled_from([0.35, 0.55]))
def test_walk_of_a_cam_class_by_class(case, radius, background):
    """From the CAM of an image and its labels to the scores of background and classes; an absent class has none."""
    hot, count = case.multi_hot(), case.size[0] * case.size[1]
    cams, affinity = case.uniform(case.batch, case.classes, *case.size), case.uniform(case.batch, count, count)
    present = present_first(hot)
    scores = scores_with_background(present.of(cams), present, case.size, background)
    walked = random_walk(scores, lambda rows, columns: affinity[:, rows, columns], radius)
    near = plain_afa.plain_mask(*case.size, radius)
    theirs = plain_afa.plain_walk(cams, affinity, near, hot, background)
    torch.testing.assert_close(walked[:, 0], theirs[:, 0])
    torch.testing.assert_close(walked[:, 1:], present.of(theirs[:, 1:]) * present.there[:, :, None, None])
