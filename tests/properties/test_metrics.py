"""Confusion matrices and every score of them against loops over pixels and classes; the sweep at every threshold."""

import math

import numpy as np
import torch
from hypothesis import given

from benchmarks.baselines.plain_acr import plain_sweep
from engine.evaluation.sweep import COUNT, THRESHOLDS, acr_iou, histogram, matrices_of, winners
from tests.properties.strategies import cases, examples
from utils.images import IGNORE
from utils.metrics import Scores, confusion_matrix


def share(part, whole):
    return part / whole if whole else math.nan if part == 0 else math.inf


@examples
@given(cases(20))
def test_scores_by_pixels(case):
    """255 is skipped in the truth alone, and a prediction may have any id there."""
    truth = case.ids().byte().numpy()
    prediction = case.integers(0, case.classes + 1, *truth.shape).byte().numpy()
    agree = case.uniform(*truth.shape).numpy() < 0.5
    prediction = np.where(agree, truth, prediction)
    ids, pairs = range(case.classes + 1), list(zip(truth.flat, prediction.flat, strict=True))
    pairs = [(int(true), int(guess)) for true, guess in pairs if true != IGNORE]
    matrix = confusion_matrix(truth, prediction, len(ids))
    expected = np.zeros((len(ids), len(ids)), np.int64)
    for true, guess in pairs:
        expected[true, guess] += 1
    np.testing.assert_array_equal(matrix, expected)
    scores, ious, recalls = Scores(matrix), [], []
    for index in ids:
        hit = sum(true == guess == index for true, guess in pairs)
        extra = sum(guess == index != true for true, guess in pairs)
        missed = sum(true == index != guess for true, guess in pairs)
        wholes = hit + extra + missed, hit + extra, hit + missed
        theirs = [*(share(hit, whole) for whole in wholes), share(extra, hit)]
        ours = [of[index] for of in (scores.iou, scores.precision, scores.recall, scores.confusion)]
        np.testing.assert_array_equal(ours, theirs)
        if hit + missed:
            ious.append(theirs[0])
            recalls.append(theirs[2])
    accuracy = share(sum(true == guess for true, guess in pairs), len(pairs))
    means = [share(sum(values), len(values)) for values in (ious, recalls)]
    np.testing.assert_allclose([scores.miou, scores.mean_accuracy, scores.pixel_accuracy], [*means, accuracy], 1e-12)


@examples
@given(cases(9))
def test_sweep_at_every_threshold(case):
    """Several images in one histogram; values that are thresholds, or equal in several classes."""
    at = torch.tensor([*THRESHOLDS, 1.0])
    values = torch.cat([at, at.nextafter(torch.tensor(2.0)), case.uniform(20).float()])
    maps, labels = case.any_of(values, case.batch, case.classes, *case.size), case.ids().byte()
    hot = case.multi_hot() > 0
    counts = np.zeros((case.classes + 1, case.classes, COUNT + 1), np.int64)
    for own, present, truth in zip(maps, hot, labels, strict=True):
        counts[:, winners(present)] += histogram(own, present, truth).numpy()
    present = [own.nonzero().flatten().tolist() for own in hot]
    stored = [{index: own[index] for index in those} for own, those in zip(maps, present, strict=True)]
    theirs = plain_sweep(stored, list(labels), THRESHOLDS, case.classes + 1)
    np.testing.assert_allclose(acr_iou(matrices_of(counts)), theirs.numpy(), 1e-12)
