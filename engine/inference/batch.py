"""Maps and label maps of a batch of images, by a plan."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from engine.config import CLASSIFIER
from engine.inference.plan import Plan, Row
from model.method import Method
from model.multi_scale import resize
from utils.crf import dense_crf
from utils.errors import UserError
from utils.images import to_uint8


class Prediction(NamedTuple):
    """What became of one image.

    maps: by kind (K, H, W) in [0, 1], or of kinds with background the scores (K+1, H, W). present: bool (K,), the
    classes whose maps count. labels: the ids uint8 (H, W) of each row. class_logits: (K,) of the classifier, None where
    it was not asked.
    """

    maps: dict[str, Tensor]
    present: Tensor
    labels: dict[Row, np.ndarray]
    class_logits: Tensor | None = None


@contextmanager
def evaluation_mode(method: Method) -> Iterator[None]:
    """Within it the method is in evaluation mode, afterwards in the mode it was in."""
    training = method.training
    method.eval()
    try:
        yield
    finally:
        method.train(training)


def predict(method: Method, image: Tensor, labels: Tensor | None, plan: Plan, name: str = "image") -> Prediction:
    """`predict_batch` of one image (3, H, W) with labels (K,)."""
    return predict_batch(method, image[None], None if labels is None else labels[None], plan, [name])[0]


@torch.no_grad()
def predict_batch(
    method: Method, images: Tensor, labels: Tensor | None, plan: Plan, names: Sequence[str]
) -> list[Prediction]:
    """Maps and label maps of images of one size (B, 3, H, W), normalised, on the method's device.

    The images are resized to plan.base_size, the maps back to (H, W), both bilinearly; labels are decided at (H, W).
    labels: their image-level labels (B, K), not read where the plan predicts them.
    Raises UserError, naming the image, where a map is not finite.
    """
    squares, class_logits = _squares(images, plan.base_size), None
    if plan.class_logits or plan.predicted == CLASSIFIER:
        class_logits = method.classify(squares)
    present = _present_classes(method, squares, class_logits, labels, plan)
    maps = method.maps(images, {kind: plan.maps[kind] for kind in plan.kinds}, present.float())
    predictions = []
    for index, name in enumerate(names):
        own = {kind: values[index] for kind, values in maps.items()}
        for kind, values in own.items():
            if not values.isfinite().all():
                raise UserError(f"{name}: the values of map '{kind}' are not finite; are the weights sound?")
        drawn = {row: _label_map(row, own, present[index], plan, images[index]) for row in plan.rows}
        own_logits = None if class_logits is None else class_logits[index]
        predictions.append(Prediction(own, present[index], drawn, own_logits))
    return predictions


def threshold(maps: Tensor, present: Tensor, bkg: float) -> Tensor:
    """Ids (H, W) of maps (K, H, W): the largest present one's, 0 where its value is <= bkg or none is present."""
    ids = present_ids(present)
    if len(ids) == 1:
        return torch.zeros(maps.shape[-2:], dtype=torch.long, device=maps.device)
    value, index = maps[present].max(0)
    return torch.where(value <= bkg, 0, ids[1:][index])


def crf_labels(scores: Tensor, ids: Tensor, image: np.ndarray, settings: dict) -> np.ndarray:
    """Ids uint8 (H, W) after the dense CRF over scores (C, H, W) of the ids (C,). image: uint8 (H, W, 3)."""
    refined = dense_crf(image, scores.float(), **settings)
    return ids.to(refined.device)[refined.argmax(0)].byte().cpu().numpy()


def _squares(images: Tensor, side: int | None) -> Tensor:
    """(B, 3, H, W) -> (B, 3, side, side); unchanged without a side."""
    return images if side is None else resize(images, (side, side))


def _present_classes(
    method: Method, squares: Tensor, class_logits: Tensor | None, labels: Tensor | None, plan: Plan
) -> Tensor:
    """bool (B, K): the given labels; or those with min_pixels of a kind with background; or classes of logit > 0, and
    where there is none those of the first kind with background."""
    if plan.predicted is None:
        if labels is None:
            raise ValueError("the plan takes given image labels, but there are none")
        return labels > 0
    if plan.predicted != CLASSIFIER:
        return _seen(method, squares, plan.predicted, plan.min_pixels)
    present, kinds = class_logits > 0, [kind for kind, declared in method.kinds.items() if declared.background]
    if kinds and not present.any(1).all():
        seen = _seen(method, squares, kinds[0], plan.min_pixels)
        present = torch.where(present.any(1, keepdim=True), present, seen)
    return present


def _seen(method: Method, squares: Tensor, kind: str, min_pixels: int) -> Tensor:
    """bool (B, K): the classes with so many pixels in the argmax of the coarse scores."""
    scores = method.coarse_scores(squares, kind)
    ids = scores.argmax(1).flatten(1)
    return torch.stack([torch.bincount(one, minlength=scores.shape[1])[1:] >= min_pixels for one in ids])


def _label_map(row: Row, maps: dict[str, Tensor], present: Tensor, plan: Plan, image: Tensor) -> np.ndarray:
    kind, with_crf = row
    values = maps[kind]
    if with_crf:
        scores, ids = _all_scores(values) if plan.kinds[kind].background else _present_scores(values, present)
        return crf_labels(scores, ids, to_uint8(image), plan.crf)
    background = plan.kinds[kind].background
    labels = values.argmax(0) if background else threshold(values, present, plan.maps[kind].bkg)
    return labels.byte().cpu().numpy()


def _all_scores(logits: Tensor) -> tuple[Tensor, Tensor]:
    """What the CRF starts from: the softmax of all classes (K+1, H, W), and their ids."""
    return logits.softmax(0), torch.arange(len(logits))


def _present_scores(maps: Tensor, present: Tensor) -> tuple[Tensor, Tensor]:
    """What the CRF starts from: background = 1 - the largest present map, then these maps; and their ids.

    As released, the scores do not sum to 1.
    """
    chosen = maps[present]
    largest = chosen.amax(0, keepdim=True) if len(chosen) else torch.zeros_like(maps[:1])
    return torch.cat([1 - largest, chosen]), present_ids(present)


def present_ids(present: Tensor) -> Tensor:
    """Background and the ids of the present classes."""
    return torch.cat([present.new_zeros(1, dtype=torch.long), present.nonzero().flatten() + 1])
