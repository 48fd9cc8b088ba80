"""The scores of label files: of exported pseudo masks, and of a folder that any project wrote."""

from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import torch

from datasets import build_image_set, data_name
from datasets.irn import irn_ids
from datasets.samples import Sample
from engine.config import RunConfig
from engine.distributed import Ranks, all_reduce_sum
from engine.evaluation.results import facts_of, scores_of, settings_of, summary_line, table, title
from engine.inference.pseudo_masks import DICTIONARY, Exported
from utils.errors import UserError, name_some
from utils.images import IGNORE, check_same_size, read_label_map
from utils.metrics import Scores, confusion_matrix
from utils.progress import progress_bar

ALONE = Ranks(0, 1, torch.device("cpu"))


def mask_summary(exported: Exported) -> str | None:
    """The line of the mIoU, which says what it is of; None where no image has a mask. All processes call it."""
    masks, plan, config = exported.masks, exported.predictor.plan, exported.predictor.config
    path_of, dataset = (lambda name: masks.path_of(exported.folder, name)), exported.dataset
    given = dataset.samples, path_of, len(dataset.classes) + 1, masks.bkg
    matrix, left_out, images = score_files(*given, exported.predictor.ranks)
    if not images:
        return None
    row = settings_of((masks.kind, masks.crf is not None), plan, facts_of(config, exported.split, images))
    heading = title({**row, "background": masks.bkg if masks.format == DICTIONARY else None})
    if masks.alphas:
        heading += ", alphas " + " and ".join(f"{alpha:g}" for alpha in dict.fromkeys(masks.alphas))
    heading += f", high {masks.high:g}, low {masks.low:g}" if masks.high is not None else ""
    if masks.alphas or masks.high is not None:
        heading += f", {_unsure(matrix, left_out)}"
    return summary_line(Scores(matrix), heading)


def folder_table(folder: Path, config: RunConfig, split: str, bkg: float | None = None) -> str:
    """The table of the label files NAME.png, or NAME.npy of irn's maps, of all images of a split that have a mask.

    bkg: the threshold of the maps, None for evaluate.bkg. Files of other images are left aside, and counted.
    Raises UserError where files are missing, or cannot be scored.
    """
    dataset = build_image_set(config, split)
    if bkg is not None and not 0 <= bkg <= 1:
        raise UserError(f"--bkg {bkg}: expected 0 to 1")
    paths = [path for path in folder.iterdir() if path.suffix in (".png", ".npy")]
    files, kinds = {path.stem: path for path in paths}, sorted({path.suffix for path in paths})
    if len(kinds) != 1 or (kinds == [".png"] and bkg is not None):
        what = f"expected .png files alone right in it, or .npy files alone for --bkg; holds {kinds}"
        raise UserError(f"{folder}: {what}")
    names = [sample.name for sample in dataset.samples if sample.mask is not None]
    missing, others = [name for name in names if name not in files], sorted(files.keys() - {*dataset.names})
    if missing:
        what = f"{len(missing)} of the {len(names)} images of {split} have no file: {name_some(missing)}"
        raise UserError(f"{folder}: {what}; files of other images: {name_some(others) or 'none'}")
    bkg, count = config.evaluate.bkg if bkg is None else bkg, len(dataset.classes) + 1
    matrix, left_out, images = score_files(dataset.samples, files.get, count, bkg, ALONE)
    heading = f"{folder}: {data_name(config.data)} {split}, {images} images"
    heading += f", background {bkg:g}" if kinds == [".npy"] else ""
    heading += f", {_unsure(matrix, left_out)}" if left_out else ""
    heading += f", {len(others)} files of other images left aside" if others else ""
    return table(scores_of(matrix, f"{split}, {folder}"), ("background", *dataset.classes), heading)


def score_files(
    samples: Sequence[Sample], path_of: Callable[[str], Path], num_ids: int, bkg: float, ranks: Ranks
) -> tuple[np.ndarray, int, int]:
    """Of all images with a mask: the confusion matrix without the pixels written as 255, their number, the images'.

    path_of: of an image's name, the PNG, or the .npy of irn's maps, which are cut at bkg. Raises UserError.
    """
    matrix, left_out = np.zeros((num_ids, num_ids), np.int64), 0
    share = [sample for sample in samples if sample.mask is not None][ranks.rank :: ranks.world]
    for sample in progress_bar(share, "score", unit="image", disable=ranks.rank != 0):
        truth, path = read_label_map(sample.mask, num_ids), path_of(sample.name)
        is_png = path.suffix == ".png"
        ids = read_label_map(path, num_ids) if is_png else irn_ids(path, bkg, num_ids, truth.shape)
        check_same_size(truth.shape, sample.mask, ids, path, "mask in the data")
        unsure = (ids == IGNORE) & (truth != IGNORE)
        matrix += confusion_matrix(np.where(unsure, IGNORE, truth), np.where(ids == IGNORE, 0, ids), num_ids)
        left_out += int(unsure.sum())
    counts = torch.tensor([*matrix.ravel(), left_out, len(share)], dtype=torch.int64, device=ranks.device)
    *cells, left_out, images = all_reduce_sum(counts).tolist()
    return np.array(cells).reshape(num_ids, num_ids), left_out, images


def _unsure(matrix: np.ndarray, left_out: int) -> str:
    return f"{100 * left_out / max(1, left_out + matrix.sum()):.2f} % of the pixels unsure and left out"
