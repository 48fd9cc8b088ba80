"""The sweep over background thresholds against the released evaluation."""

import numpy as np
import torch

from engine.evaluation.sweep import COUNT, acr_iou, histogram, matrices_of, winners
from utils.metrics import Scores


def test_the_curve(golden):
    arrays = golden("acr/evaluation.npz")
    ids = int(arrays["num_classes"])
    counts = np.zeros((ids, ids - 1, COUNT + 1), np.int64)
    for index in range(int(arrays["num_images"])):
        cams, classes, truth = (arrays[f"{index}__{name}"] for name in ("cams_u8", "classes", "label"))
        maps, present = torch.zeros(ids - 1, *truth.shape), torch.zeros(ids - 1, dtype=torch.bool)
        maps[classes], present[classes] = torch.from_numpy(cams.astype(np.float32) / 256), True
        counts[:, winners(present)] += histogram(maps, present, torch.from_numpy(truth)).numpy()
    iou = 100 * acr_iou(matrices_of(counts))
    curve, miou = iou.mean(1), np.array([Scores(matrix).miou for matrix in matrices_of(counts)])
    for name, ours in {"iou": iou, "curve": curve, "best_miou": curve.max()}.items():
        np.testing.assert_allclose(ours, arrays[name], rtol=1e-6, err_msg=name)
    assert curve.argmax() == miou.argmax() == arrays["best_index"]
