"""The mIoU of exported pseudo masks, where the data has masks to compare them with."""

import numpy as np
import torch

from datasets import data_name
from engine.distributed import all_reduce_sum
from engine.evaluation.results import settings_of, summary_line, title
from engine.inference.pseudo_masks import DICTIONARY, Exported
from utils.images import IGNORE, read_label_map
from utils.metrics import Scores, confusion_matrix


def mask_summary(exported: Exported) -> str | None:
    """The line of the mIoU, which says what it is of; None where no image has a mask. All processes call it."""
    matrix, left_out, images = score_masks(exported)
    if not images:
        return None
    masks, plan, config = exported.masks, exported.predictor.plan, exported.predictor.config
    facts = {"method": config.method, "dataset": data_name(config.data), "split": exported.split, "images": images}
    row = settings_of((masks.kind, masks.crf is not None), plan, facts)
    heading = title({**row, "background": masks.bkg if masks.format == DICTIONARY else None})
    if masks.high is not None:
        share = 100 * left_out / max(1, left_out + matrix.sum())
        heading += f", high {masks.high:g}, low {masks.low:g}, {share:.2f} % of the pixels unsure and left out"
    return summary_line(Scores(matrix), heading)


def score_masks(exported: Exported) -> tuple[np.ndarray, int, int]:
    """Of all images with a mask: the confusion matrix without the pixels written as 255, their number, the images'."""
    masks, dataset, ranks = exported.masks, exported.dataset, exported.predictor.ranks
    count = len(dataset.classes) + 1
    matrix, left_out, images = np.zeros((count, count), np.int64), 0, 0
    for sample in dataset.samples[ranks.rank :: ranks.world]:
        if sample.mask is not None:
            truth, ids = read_label_map(sample.mask, count), masks.read(exported.folder, sample.name, count)
            unsure = (ids == IGNORE) & (truth != IGNORE)
            matrix += confusion_matrix(np.where(unsure, IGNORE, truth), np.where(ids == IGNORE, 0, ids), count)
            left_out, images = left_out + int(unsure.sum()), images + 1
    counts = torch.tensor([*matrix.ravel(), left_out, images], dtype=torch.int64, device=ranks.device)
    *cells, left_out, images = all_reduce_sum(counts).tolist()
    return np.array(cells).reshape(count, count), left_out, images
