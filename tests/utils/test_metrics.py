"""Scores against loops over pixels."""

import numpy as np
import pytest

from utils.metrics import Scores, confusion_matrix


def maps(seed: int, ids: int) -> tuple[np.ndarray, np.ndarray]:
    """Ground truth with 255 in it, without id 1; a prediction without the last id."""
    rng = np.random.default_rng(seed)
    truth = rng.choice([i for i in range(ids) if i != 1] + [255], (9, 11)).astype(np.uint8)
    return truth, rng.integers(0, ids - 1, truth.shape).astype(np.uint8)


def test_scores_of_every_class():
    truth, prediction = maps(1, 6)
    counted = truth != 255
    scores = Scores(confusion_matrix(truth, prediction, 6))
    ious, recalls = [], []
    for i in range(6):
        t, p = (truth == i) & counted, (prediction == i) & counted
        tp, fp, fn = (t & p).sum(), (p & ~t).sum(), (t & ~p).sum()
        assert scores.iou[i] == tp / (tp + fp + fn)
        if p.any():
            assert scores.precision[i] == tp / p.sum()
        if tp:
            assert scores.confusion[i] == fp / tp
        if t.any():
            assert scores.recall[i] == tp / t.sum()
            ious.append(tp / (tp + fp + fn))
            recalls.append(tp / t.sum())
    assert len(ious) == scores.present.sum() == 5
    assert scores.miou == pytest.approx(np.mean(ious), rel=1e-12)
    assert scores.mean_accuracy == pytest.approx(np.mean(recalls), rel=1e-12)
    assert scores.pixel_accuracy == (truth == prediction)[counted].mean()
    assert scores.confusion[1] == np.inf and np.isnan(scores.recall[1])       # predicted, never there
    assert scores.recall[5] == 0 and np.isnan(scores.precision[5])            # there, never predicted


def test_a_class_in_neither_map_is_nan_and_outside_of_the_mean():
    scores = Scores(confusion_matrix(np.array([[0, 0, 1]]), np.array([[0, 0, 1]]), 3))
    np.testing.assert_array_equal(scores.iou, [1, 1, np.nan])
    assert scores.miou == 1.0


def test_ignored_pixels_may_be_predicted_as_anything():
    assert confusion_matrix(np.array([255, 0]), np.array([255, 0]), 2).sum() == 1


def test_nothing_to_score():
    scores = Scores(confusion_matrix(np.full((2, 2), 255), np.zeros((2, 2), int), 3))
    assert np.isnan([scores.miou, scores.pixel_accuracy, scores.mean_accuracy, *scores.iou]).all()


@pytest.mark.parametrize(
    ("truth", "prediction", "message"),
    [
        ([0, 1], [0, 3], "prediction holds id 3"),
        ([0, 1], [0, 255], "prediction holds id 255"),
        ([0, 1], [0, -1], "prediction holds id -1"),
        ([0, 3], [0, 1], "ground truth holds id 3"),
        ([0, 1], [0, 1, 1], "shapes"),
    ],
)
def test_ids_out_of_range_are_refused(truth, prediction, message):
    with pytest.raises(ValueError, match=message):
        confusion_matrix(np.array(truth), np.array(prediction), 3)
