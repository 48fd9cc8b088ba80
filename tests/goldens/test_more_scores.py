"""Scores of label maps against the released code."""

import numpy as np

from utils.metrics import Scores, confusion_matrix


def test_scores(golden):
    arrays = golden("more/scores.npz")
    ids = int(arrays["num_classes"])
    pairs = [(arrays[f"gt_{i}"], arrays[f"pred_{i}"]) for i in range(int(arrays["num_maps"]))]
    scores = Scores(sum(confusion_matrix(truth, prediction, ids) for truth, prediction in pairs))
    np.testing.assert_array_equal(scores.matrix, arrays["hist"])
    ours = {
        "pAcc": scores.pixel_accuracy, "mAcc": scores.mean_accuracy, "miou": scores.miou, "iou": scores.iou,
        "precision": scores.precision, "recall": scores.recall, "confusion": scores.confusion,
    }
    for name, value in ours.items():
        np.testing.assert_allclose(np.float32(value), arrays[name], rtol=0, atol=1e-6, err_msg=name)
