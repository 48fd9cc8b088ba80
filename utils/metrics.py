"""Scores of label maps, from exact counts of pixels."""

import numpy as np

from utils.images import IGNORE


def confusion_matrix(truth: np.ndarray, prediction: np.ndarray, num_ids: int) -> np.ndarray:
    """Pixel counts, int64 (num_ids, num_ids): row the true id, column the predicted one; 255 in truth is skipped.

    truth, prediction: integer ids of one shape. Matrices of several images are summed.
    Raises ValueError for shapes that differ and for ids out of 0..num_ids-1.
    """
    if truth.shape != prediction.shape:
        raise ValueError(f"ground truth is {truth.shape}, prediction {prediction.shape}: shapes must agree")
    counted = truth != IGNORE
    truth, prediction = truth[counted].astype(np.int64), prediction[counted].astype(np.int64)
    for name, ids in (("ground truth", truth), ("prediction", prediction)):
        if ids.size and (ids.min() < 0 or ids.max() >= num_ids):
            bad = ids.min() if ids.min() < 0 else ids.max()
            raise ValueError(f"{name} holds id {bad}, but ids are 0..{num_ids - 1}")
    return np.bincount(truth * num_ids + prediction, minlength=num_ids**2).reshape(num_ids, num_ids)


class Scores:
    """What a confusion matrix (K+1, K+1) says; every score is a share in 0..1.

    iou, precision, recall, confusion: float64 (K+1,). confusion is FP / TP. A share of nothing is nan: the IoU of an id
    in neither map, the precision of an id never predicted, the recall of an id not in the ground truth.
    miou: over the ids that occur in the ground truth. mean_accuracy: the mean of their recalls.
    """

    def __init__(self, matrix: np.ndarray) -> None:
        self.matrix = matrix
        hit, true, predicted = np.diag(matrix), matrix.sum(1), matrix.sum(0)
        self.present = true > 0
        with np.errstate(divide="ignore", invalid="ignore"):
            self.iou = hit / (true + predicted - hit)
            self.precision = hit / predicted
            self.recall = hit / true
            self.confusion = (predicted - hit) / hit
            self.pixel_accuracy = float(hit.sum() / matrix.sum())
        self.miou = _mean(self.iou[self.present])
        self.mean_accuracy = _mean(self.recall[self.present])


def _mean(values: np.ndarray) -> float:
    return float(values.mean()) if values.size else float("nan")
