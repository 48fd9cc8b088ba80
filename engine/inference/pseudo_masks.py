"""Pseudo masks for the second stage: ids with 255 where unsure, and the dictionaries of irn (Ahn et al., CVPR 2019)."""

import math
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from datasets import EvalItem, ImageSet
from engine.config import RunConfig
from engine.inference.batch import Prediction, crf_labels, on_host, present_ids, present_scores, threshold
from engine.inference.plan import Plan, seed_kind
from engine.inference.prediction_folder import Predictor, Written
from model import METHODS
from model.multi_scale import resize
from utils.crf import dense_crf
from utils.errors import UserError
from utils.files import replacing
from utils.images import IGNORE, to_uint8, write_label_png

CONFIDENCE = 0.7   # [irn] probability of the label that a pixel has, where the CRF starts
STRIDE = 4         # [irn] of `cam`
PNG, DICTIONARY, IRN_LABEL = FORMATS = ("png", "npy", "irn-label")
IRN_HIGH, IRN_LOW = 0.30, 0.05   # [irn] conf_fg_thres, conf_bg_thres
IRN_CRF = {"iterations": 10, "pos_xy_std": 3, "pos_w": 3, "bi_xy_std": 50, "bi_rgb_std": 5, "bi_w": 10}   # [irn]


class MaskFormat:
    """How the maps of a kind become a file.

    format: one of FORMATS. kind: of the map. high, low: thresholds of PNGs, None for those that an argmax decides and
    for dictionaries. alphas: as `ids_of_alphas` takes them, in place of thresholds; None for none. crf: settings of
    `dense_crf`, None for none. bkg: the threshold at which a dictionary is scored.
    """

    def __init__(self, config: RunConfig, kind: str, format: str = PNG, high: float | None = None,
                 low: float | None = None, alphas: Sequence[float] | None = None) -> None:
        """high, low: None for the method's, `Method.sure_above`, or irn's. alphas: one, or low and high.

        Raises UserError for what does not fit.
        """
        self.format, self.kind, self.bkg = format, kind, config.evaluate.bkg
        self.ending = "npy" if format == DICTIONARY else "png"
        method, given = METHODS[config.method], (high, low) != (None, None)
        if method.kinds[kind].background and (format != PNG or given):
            raise UserError(f"map {kind} has a background of its own: format png alone, without high and low")
        if format == DICTIONARY and (config.evaluate.crf or given):
            raise UserError("format npy holds the maps themselves: high, low and evaluate.crf have no part in it")
        if alphas is not None and (format != PNG or given or method.kinds[kind].background):
            what = f"format {PNG}, without high and low, and maps without a background of their own"
            raise UserError(f"alphas are for {what}; the map is {kind}, the format {format}")
        self.high = self.low = None
        self.alphas = None if alphas is None else checked_alphas(alphas)
        if format != DICTIONARY and alphas is None and not method.kinds[kind].background:
            default = (IRN_HIGH, IRN_LOW) if format == IRN_LABEL else method.sure_above(config)
            self.high = default[0] if high is None else high
            self.low = default[1] if low is None else low
            check_thresholds(self.high, self.low)
        own_crf = config.crf.settings() if config.evaluate.crf or alphas else None
        self.crf = {"backend": config.crf.backend, **IRN_CRF} if format == IRN_LABEL else own_crf

    def path_of(self, folder: Path, name: str) -> Path:
        return folder / f"{name}.{self.ending}"

    def take(self, items: list[EvalItem], predictions: list[Prediction], plan: Plan) -> list:
        """What `write` gets of them: ids uint8 (H, W), or for a dictionary the prediction of `on_host`."""
        if self.format == DICTIONARY:
            return on_host(predictions, plan)
        if self.high is self.alphas is None:
            return [prediction.labels[self.kind, self.crf is not None] for prediction in predictions]
        rule, how = (ids_of_alphas, self.alphas) if self.alphas else (confident_ids, (self.high, self.low))
        pairs = zip(items, predictions, strict=True)
        return [rule(one.maps[self.kind], one.present, to_uint8(item.image), *how, self.crf) for item, one in pairs]

    def write(self, folder: Path, item: EvalItem, taken: np.ndarray | Prediction) -> None:
        path = self.path_of(folder, item.name)
        if self.format == DICTIONARY:
            save_irn(path, taken.maps[self.kind], taken.present)
        else:
            write_label_png(path, taken)


class Exported(NamedTuple):
    """A folder of pseudo masks: what it was made with, of which images, and what was written now."""

    folder: Path
    masks: MaskFormat
    predictor: Predictor
    dataset: ImageSet
    split: str
    written: Written


def export_masks(
    predictor: Predictor, folder: Path, split: str | None = None, format: str = PNG, high: float | None = None,
    low: float | None = None, overwrite: bool = False, alphas: Sequence[float] | None = None,
) -> Exported:
    """Writes the pseudo masks of a split, None for data.train_split, from one kind of map.

    The rest as `MaskFormat` takes it. Raises UserError, also where the folder is that of the data's own masks.
    """
    config, kind = predictor.config, seed_kind(predictor.config)
    masks, split = MaskFormat(config, kind, format, high, low, alphas), split or config.data.train_split
    plan = predictor.plan.only(kind)
    if not plan.kinds[kind].background:
        plan = plan._replace(crf=None, background_power=1.0)   # the format has its own CRF
    predictor.plan = plan
    dataset = predictor.images_of(split)
    if any(sample.mask and sample.mask.parent.resolve() == folder.resolve() for sample in dataset.samples):
        raise UserError(f"{folder}: holds the masks of the data set; give another folder")
    depends_on = {**vars(masks), "split": split, "images": dataset.identity()}
    is_done = predictor.claim(folder, overwrite, depends_on)
    written = predictor.write(
        dataset, partial(masks.write, folder), lambda name: is_done(masks.path_of(folder, name)), "export",
        partial(masks.take, plan=predictor.plan),
    )
    return Exported(folder, masks, predictor, dataset, split, written)


def confident_ids(
    maps: Tensor, present: Tensor, image: np.ndarray, high: float, low: float, crf: dict | None = None
) -> np.ndarray:
    """Ids uint8 (H, W): a class where it wins at threshold `high`, 0 where none does at `low`, 255 elsewhere.

    maps: (K, H, W) in [0, 1]. present: bool (K,). image: uint8 (H, W, 3). With high == low and no CRF nothing is 255.
    crf: settings of `dense_crf`, which refines the labels of either threshold by itself; a pixel is a class only if it
    is one at `high`, and background only if it is at both (irn's cam_to_ir_label).
    """
    ids = {value: threshold(maps, present, value) for value in {high, low}}
    if crf is not None:
        ids = {value: _refined(one, present, image, crf) for value, one in ids.items()}
    sure, possible = ids[high], ids[low]
    return torch.where(sure > 0, sure, torch.where(possible == 0, 0, IGNORE)).byte().cpu().numpy()


def ids_of_alphas(maps: Tensor, present: Tensor, image: np.ndarray, low: float, high: float, crf: dict) -> np.ndarray:
    """Ids uint8 (H, W) of the dense CRF that starts from the maps and the background (1 - the largest) ** alpha.

    The less the alpha, the more background. A class where the CRF of `low` says that class, 0 where that of `high` says
    background, 255 where neither or both is so (AffinityNet's two alphas, Ahn, Kwak, CVPR 2018). With low == high
    nothing is 255. maps, present, image: as `confident_ids` takes them. crf: settings of `dense_crf`.
    """
    of = {alpha: crf_labels(*present_scores(maps, present, alpha), image, crf) for alpha in {low, high}}
    agree = (of[low] > 0) == (of[high] > 0)
    return torch.where(agree, of[low], IGNORE).byte().cpu().numpy()


def save_irn(path: Path, maps: Tensor, present: Tensor) -> None:
    """Writes what irn's make_cam writes of the maps (C, H, W) of C present classes; present: bool (K,).

    keys: int64 tensor (C,), classes from 0. cam: float32 tensor (C, ceil(H / 4), ceil(W / 4)). high_res: float32 array
    (C, H, W).
    """
    keys, maps = present.nonzero().flatten(), maps.float()
    size = [-(-side // STRIDE) for side in maps.shape[-2:]]
    strided = resize(maps[None], size)[0] if len(maps) else maps.new_zeros(0, *size)
    with replacing(path) as part, open(part, "wb") as file:
        np.save(file, {"keys": keys, "cam": strided.clone(), "high_res": maps.numpy()}, allow_pickle=True)


def check_thresholds(high: float, low: float) -> None:
    """Raises UserError unless 0 <= low <= high <= 1."""
    if not 0 <= low <= high <= 1:
        raise UserError(f"high = {high}, low = {low}: expected 0 <= low <= high <= 1")


def checked_alphas(alphas: Sequence[float]) -> tuple[float, float]:
    """Low and high of one alpha or two. Raises UserError unless 0 < low <= high."""
    if len(alphas) > 2 or not 0 < alphas[0] <= alphas[-1] < math.inf:
        given = " ".join(f"{alpha:g}" for alpha in alphas)
        raise UserError(f"alphas {given}: expected one above 0, or LOW and HIGH with LOW <= HIGH")
    return alphas[0], alphas[-1]


def _refined(ids: Tensor, present: Tensor, image: np.ndarray, crf: dict) -> Tensor:
    """Ids (H, W) after the dense CRF, which starts from CONFIDENCE in them and shares the rest among the others."""
    known = present_ids(present).to(ids.device, non_blocking=True)
    if len(known) == 1:
        return ids
    rest = (1 - CONFIDENCE) / (len(known) - 1)
    scores = torch.where(ids == known[:, None, None], CONFIDENCE, rest)
    return known[dense_crf(image, scores, **crf).argmax(0)]
