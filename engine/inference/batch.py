"""Maps and label maps of a batch of images, by a plan."""

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from engine.config import CLASSIFIER
from engine.inference.plan import Plan, Row
from engine.precision import autocast
from model.method import Method
from model.multi_scale import resize
from utils.crf import dense_crf
from utils.errors import UserError
from utils.images import to_bytes


class Prediction(NamedTuple):
    """What became of one image.

    maps: by kind (K, H, W) in [0, 1], or of kinds with background the scores (K+1, H, W), on the method's device; after
    `on_host` those of the present classes alone. All else is on the CPU. present: bool (K,), the classes whose maps
    count. labels: the ids uint8 (H, W) of each row. class_logits: (K,) of the classifier, None where it was not asked.
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

    The images are resized to plan.input_size, the maps back to (H, W), both bilinearly; labels are decided at (H, W).
    labels: their image-level labels (B, K), not read where the plan predicts them.
    Raises UserError, naming the image, where a map is not finite.
    """
    inputs, class_logits = resize(images, plan.input_size(*images.shape[-2:])), None
    with autocast(images.device, plan.precision, cache=False):
        if plan.class_logits or plan.predicted == CLASSIFIER:
            class_logits = method.classify(inputs)
        there = _present_classes(method, inputs, class_logits, labels, plan)
        maps = method.maps(images, {kind: plan.maps[kind] for kind in plan.kinds}, there.float())
    logits = () if class_logits is None else (class_logits,)
    pictures = (to_bytes(images),) if plan.crf else ()
    finite = torch.stack([values.isfinite().flatten(1).all(1) for values in maps.values()])   # (kinds, B)
    ids, finite, present, *more = to_host(_label_maps(maps, there, plan), finite, there, *logits, *pictures)
    for name, of_image in zip(names, finite.T.tolist(), strict=True):
        if not all(of_image):
            kind = list(maps)[of_image.index(False)]
            raise UserError(f"{name}: the values of map '{kind}' are not finite; are the weights sound?")
    rows = dict(zip(((kind, False) for kind in plan.kinds), ids, strict=True))
    if plan.crf:
        rows |= _crf_label_maps(maps, present, more[-1].numpy(), plan)
    predictions = []
    for index in range(len(names)):
        own = {kind: values[index] for kind, values in maps.items()}
        drawn = {row: rows[row][index].numpy() for row in plan.rows}
        predictions.append(Prediction(own, present[index], drawn, more[0][index] if logits else None))
    return predictions


def to_host(*tensors: Tensor) -> list[Tensor]:
    """The tensors on the CPU, as bytes of one transfer: the host waits for the device once."""
    aligned = sorted(range(len(tensors)), key=lambda index: -tensors[index].element_size())
    parts = [tensors[index].flatten().view(torch.uint8) for index in aligned]
    packed = torch.cat(parts).cpu().split([len(part) for part in parts]) if parts else ()
    back = dict(zip(aligned, packed, strict=True))
    return [back[index].view(tensor.dtype).view(tensor.shape) for index, tensor in enumerate(tensors)]


def on_host(predictions: Sequence[Prediction], plan: Plan) -> list[Prediction]:
    """The predictions with the maps (C, H, W) of their C present classes on the CPU, of kinds without background; one
    transfer brings them."""
    kinds = [kind for kind, declared in plan.kinds.items() if not declared.background]
    maps = iter(to_host(*(present_maps(one.maps[kind], one.present) for one in predictions for kind in kinds)))
    return [one._replace(maps={kind: next(maps) for kind in kinds}) for one in predictions]


def threshold(maps: Tensor, present: Tensor, bkg: float) -> Tensor:
    """Ids (..., H, W) of maps (..., K, H, W): the largest present one's, 0 where that is <= bkg or none is present.

    present: bool (..., K).
    """
    absent = ~present.to(maps.device, non_blocking=True)[..., None, None]
    value, index = maps.masked_fill(absent, -math.inf).max(-3)
    return torch.where(value <= bkg, 0, index + 1)


def crf_labels(scores: Tensor, ids: Tensor, image: np.ndarray, settings: dict) -> Tensor:
    """Ids uint8 (H, W) after the dense CRF over scores (C, H, W) of the ids (C,). image: uint8 (H, W, 3)."""
    refined = dense_crf(image, scores.float(), **settings)
    return ids.to(refined.device, non_blocking=True)[refined.argmax(0)].byte()


def _present_classes(
    method: Method, inputs: Tensor, class_logits: Tensor | None, labels: Tensor | None, plan: Plan
) -> Tensor:
    """bool (B, K): the given labels; or those with min_pixels of a kind with background; or classes of logit > 0, and
    where there is none those of the first kind with background that takes no labels itself."""
    if plan.predicted is None:
        if labels is None:
            raise ValueError("the plan takes given image labels, but there are none")
        return labels > 0
    if plan.predicted != CLASSIFIER:
        return _seen(method, inputs, plan.predicted, plan.min_pixels)
    present, declared = class_logits > 0, method.kinds.items()
    kinds = [kind for kind, of in declared if of.background and not of.uses_labels]
    if kinds and not to_host(present.any(1))[0].all():
        seen = _seen(method, inputs, kinds[0], plan.min_pixels)
        present = torch.where(present.any(1, keepdim=True), present, seen)
    return present


def _seen(method: Method, inputs: Tensor, kind: str, min_pixels: int) -> Tensor:
    """bool (B, K): the classes with so many pixels in the argmax of the coarse scores."""
    scores = method.coarse_scores(inputs, kind)
    ids = scores.argmax(1).flatten(1)
    counts = ids.new_zeros(scores.shape[:2]).scatter_add_(1, ids, torch.ones_like(ids))
    return counts[:, 1:] >= min_pixels


def _label_maps(maps: dict[str, Tensor], present: Tensor, plan: Plan) -> Tensor:
    """Ids uint8 (kinds, B, H, W) without CRF, decided on the device of the maps (B, K, H, W)."""
    return torch.stack([
        (maps[kind].argmax(1) if of.background else threshold(maps[kind], present, plan.maps[kind].bkg)).byte()
        for kind, of in plan.kinds.items()
    ])


def _crf_label_maps(maps: dict[str, Tensor], present: Tensor, pictures: np.ndarray, plan: Plan) -> dict[Row, Tensor]:
    """Ids uint8 (B, H, W) of the rows with CRF, on the CPU. present: bool (B, K), pictures: uint8 (B, H, W, 3), both
    there already."""
    made = {}
    for kind, declared in plan.kinds.items():
        refined = []
        for values, own, picture in zip(maps[kind], present, pictures, strict=True):
            of_kind = _all_scores(values) if declared.background else present_scores(values, own, plan.background_power)
            refined.append(crf_labels(*of_kind, picture, plan.crf))
        made[kind, True] = torch.stack(refined)
    return dict(zip(made, to_host(*made.values()), strict=True))


def _all_scores(logits: Tensor) -> tuple[Tensor, Tensor]:
    """What the CRF starts from: the softmax of all classes (K+1, H, W), and their ids."""
    return logits.softmax(0), torch.arange(len(logits))


def present_scores(maps: Tensor, present: Tensor, power: float = 1.0) -> tuple[Tensor, Tensor]:
    """What the CRF starts from: background = (1 - the largest present map) ** power, then these maps; and their ids.

    As released, by MoRe with power 1 and by ACR with others, the scores do not sum to 1.
    """
    chosen = present_maps(maps, present)
    largest = chosen.amax(0, keepdim=True) if len(chosen) else torch.zeros_like(maps[:1])
    return torch.cat([(1 - largest).clamp(min=0) ** power, chosen]), present_ids(present)


def present_ids(present: Tensor) -> Tensor:
    """Background and the ids of the present classes."""
    return torch.cat([present.new_zeros(1, dtype=torch.long), present.nonzero().flatten() + 1])


def present_maps(maps: Tensor, present: Tensor) -> Tensor:
    """The maps (C, H, W) of the present classes of (K, H, W), on their device. present: bool (K,), on the CPU."""
    chosen = [maps[index] for index in present.nonzero().flatten().tolist()]
    return torch.stack(chosen) if chosen else maps[:0]
