"""Pseudo masks for the second stage: ids with 255 where unsure, and the dictionaries of irn (Ahn et al., CVPR 2019)."""

from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from engine.inference.predict import present_ids, threshold
from model.multi_scale import resize
from utils.crf import dense_crf
from utils.errors import UserError
from utils.files import replacing
from utils.images import IGNORE

CONFIDENCE = 0.7   # [irn] probability of the label that a pixel has, where the CRF starts
STRIDE = 4         # [irn] of `cam`


def confident_ids(
    maps: Tensor, present: Tensor, image: np.ndarray, high: float, low: float, crf: dict | None = None
) -> np.ndarray:
    """Ids uint8 (H, W): a class where it wins at threshold `high`, 0 where none does at `low`, 255 elsewhere.

    maps: (K, H, W) in [0, 1]. present: bool (K,). image: uint8 (H, W, 3). With high == low and no CRF nothing is 255.
    crf: settings of `dense_crf`, which refines the labels of either threshold by itself; a pixel is a class only if it
    is one at `high`, and background only if it is at both (irn's cam_to_ir_label).
    """
    ids = [threshold(maps, present, value) for value in (high, low)]
    if crf is not None:
        ids = [_refined(one, present, image, crf) for one in ids]
    sure, possible = ids
    return torch.where(sure > 0, sure, torch.where(possible == 0, 0, IGNORE)).byte().cpu().numpy()


def save_irn(path: Path, maps: Tensor, present: Tensor) -> None:
    """Writes a dictionary as irn's make_cam does: the maps of the present classes alone.

    keys: int64 tensor (C,), classes from 0. cam: float32 tensor (C, ceil(H / 4), ceil(W / 4)). high_res: float32 array
    (C, H, W).
    """
    keys, maps = present.nonzero().flatten().cpu(), maps[present].float().cpu()
    size = [-(-side // STRIDE) for side in maps.shape[-2:]]
    strided = resize(maps[None], size)[0] if len(maps) else maps.new_zeros(0, *size)
    with replacing(path) as part, open(part, "wb") as file:
        np.save(file, {"keys": keys, "cam": strided.clone(), "high_res": maps.numpy()}, allow_pickle=True)


def irn_ids(path: Path, bkg: float) -> np.ndarray:
    """Ids uint8 (H, W) of a file of `save_irn`: the largest map's class, 0 where it is <= bkg.

    Reading such a file runs what it says, so it is for our own alone.
    """
    content = np.load(path, allow_pickle=True).item()
    maps = torch.from_numpy(content["high_res"])
    ids = threshold(maps, torch.ones(len(maps), dtype=torch.bool), bkg)
    return np.array([0, *(content["keys"] + 1)], np.uint8)[ids]


def check_thresholds(high: float, low: float) -> None:
    """Raises UserError unless 0 <= low <= high <= 1."""
    if not 0 <= low <= high <= 1:
        raise UserError(f"high = {high}, low = {low}: expected 0 <= low <= high <= 1")


def _refined(ids: Tensor, present: Tensor, image: np.ndarray, crf: dict) -> Tensor:
    """Ids (H, W) after the dense CRF, which starts from CONFIDENCE in them and shares the rest among the others."""
    known = present_ids(present)
    if len(known) == 1:
        return ids
    rest = (1 - CONFIDENCE) / (len(known) - 1)
    scores = torch.where(ids == known[:, None, None], CONFIDENCE, rest)
    return known[dense_crf(image, scores, **crf).argmax(0)]
