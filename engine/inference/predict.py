"""Maps and label maps of images, by a plan that says how.

A method is known by `localize`, `segment` and `classify` alone. Sources of the settings: configs/default.yaml.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import NamedTuple

import numpy as np
import torch
from omegaconf import DictConfig, OmegaConf
from torch import Tensor, nn

from model.multi_scale import min_max, resize
from utils.crf import dense_crf
from utils.errors import UserError
from utils.images import to_uint8

KINDS = ("cam", "lam", "seg")
VALIDATION_LAM_BKG = 0.5   # [code]
Row = tuple[str, bool]     # the kind of a map, with or without CRF


class MapPlan(NamedTuple):
    """How one kind of map is made: scales, flip, background threshold (the segmentation has none)."""

    scales: tuple[float, ...]
    flip: bool
    bkg: float = 0.0


class Plan(NamedTuple):
    """What is made of an image, and how.

    kinds: of the maps wanted, out of `cam`, `lam`, `seg`, `fused`. maps: how each is made; `seg` is always there.
    base_size: side of the square the image becomes; None: native size.
    predicted: None for given image labels, else where they come from (`classifier`, `segmentation`).
    min_pixels: a class of the segmentation counts from this many pixels.
    crf: settings of `dense_crf`, None for none; with them every label map is made without and with CRF.
    class_logits: whether the classifier's logits are wanted, whatever image labels come from.
    """

    kinds: tuple[str, ...]
    maps: dict[str, MapPlan]
    base_size: int | None
    predicted: str | None = None
    min_pixels: int = 1
    crf: dict | None = None
    class_logits: bool = False

    @property
    def rows(self) -> list[Row]:
        """The label maps that come of it."""
        return [(kind, crf) for kind in self.kinds for crf in ((False, True) if self.crf else (False,))]


class Prediction(NamedTuple):
    """What became of one image.

    maps: by kind (K, H, W) in [0, 1], for `seg` the logits (K+1, H, W). present: bool (K,), the classes whose maps
    count. labels: the ids uint8 (H, W) of each row. class_logits: (K,) of the classifier, None where it was not asked.
    """

    maps: dict[str, Tensor]
    present: Tensor
    labels: dict[Row, np.ndarray]
    class_logits: Tensor | None = None


def row_name(row: Row) -> str:
    """`cam`, or with CRF `cam_crf`."""
    return row[0] + ("_crf" if row[1] else "")


def evaluation_plan(config: DictConfig) -> Plan:
    """The plan of the tools: sections `evaluate` and `crf`. Raises UserError for maps that do not exist."""
    c = config.evaluate
    if not c.maps or not set(c.maps) <= set(KINDS):
        raise UserError(f"evaluate.maps = {list(c.maps)}: expected one or more of {', '.join(KINDS)}")
    maps = {
        "cam": MapPlan(_with_scale_1(c.multi_scales if c.multi_scale else c.cam_scales), c.flip, c.bkg),
        "lam": MapPlan(_with_scale_1(c.multi_scales if c.multi_scale else c.lam_scales), c.flip, c.bkg),
        "seg": MapPlan(tuple(c.seg_scales), c.flip),
    }
    predicted = c.predict_from if c.image_labels == "predicted" else None
    crf = OmegaConf.to_container(config.crf) if c.crf else None
    return Plan(tuple(dict.fromkeys(c.maps)), maps, c.base_size, predicted, c.min_pixels, crf)


def validation_plan(config: DictConfig) -> Plan:
    """The plan of the validation in training, as released: squares, given labels, no CRF, CAM at its training scales.

    `fused` is the product of CAM and LAM, brought to [0, 1] per map again, at the CAM's threshold.
    Without evaluate.base_size the squares have the side of the crops.
    """
    cam = MapPlan(_with_scale_1(config.pseudo_labels.cam_scales), True, config.evaluate.bkg)
    maps = {"cam": cam, "lam": MapPlan((1.0,), False, VALIDATION_LAM_BKG), "fused": cam, "seg": MapPlan((1.0,), False)}
    return Plan(tuple(maps), maps, config.evaluate.base_size or config.data.crop_size)


@contextmanager
def evaluation_mode(method: nn.Module) -> Iterator[None]:
    """Within it the method is in evaluation mode, afterwards in the mode it was in."""
    training = method.training
    method.eval()
    try:
        yield
    finally:
        method.train(training)


def predict(method: nn.Module, image: Tensor, labels: Tensor | None, plan: Plan, name: str = "image") -> Prediction:
    """`predict_batch` of one image (3, H, W) with labels (K,)."""
    return predict_batch(method, image[None], None if labels is None else labels[None], plan, [name])[0]


@torch.no_grad()
def predict_batch(
    method: nn.Module, images: Tensor, labels: Tensor | None, plan: Plan, names: Sequence[str]
) -> list[Prediction]:
    """Maps and label maps of images of one size (B, 3, H, W), normalised, on the method's device.

    The images are resized to plan.base_size, the maps back to (H, W), both bilinearly; labels are decided at (H, W).
    labels: their image-level labels (B, K), not read where the plan predicts them.
    Raises UserError, naming the image, where a map is not finite.
    """
    size = images.shape[-2:]
    squares = _squares(images, plan.base_size, 1.0)
    maps: dict[str, Tensor] = {}
    if "seg" in plan.kinds or plan.predicted == "segmentation":
        maps["seg"] = _segment(method, images, plan)
    needed = [kind for kind in ("cam", "lam") if kind in plan.kinds or "fused" in plan.kinds]
    coarse = {kind: method.localize(squares, kind, plan.maps[kind].scales, plan.maps[kind].flip) for kind in needed}
    if "fused" in plan.kinds:
        coarse["fused"] = min_max(coarse["cam"] * coarse["lam"])
    maps.update({kind: resize(values, size) for kind, values in coarse.items()})
    class_logits = method.classify(squares) if plan.class_logits or plan.predicted == "classifier" else None
    present = _present_classes(class_logits, labels, maps.get("seg"), plan)
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


def _squares(images: Tensor, base_size: int | None, scale: float) -> Tensor:
    """(B, 3, H, W) -> (B, 3, S, S) with S = int(scale * base_size); unchanged where there is no base size."""
    return images if base_size is None else resize(images, (int(scale * base_size),) * 2)


def _segment(method: nn.Module, images: Tensor, plan: Plan) -> Tensor:
    """Logits (B, K+1, H, W). As released, every square is made from the image, not from the square of scale 1."""
    scales, flip, _ = plan.maps["seg"]
    if plan.base_size is None:
        return method.segment(images, scales, flip)
    squares = (_squares(images, plan.base_size, scale) for scale in scales)
    logits = [method.segment(square, (1.0,), flip, images.shape[-2:]) for square in squares]
    return torch.stack(logits).amax(0)


def _present_classes(
    class_logits: Tensor | None, labels: Tensor | None, logits: Tensor | None, plan: Plan
) -> Tensor:
    """bool (B, K): the given labels; or classes of logit > 0; or those with min_pixels of the segmentation."""
    if plan.predicted == "classifier":
        return class_logits > 0
    if plan.predicted == "segmentation":
        found = (torch.bincount(one.argmax(0).flatten(), minlength=len(one)) for one in logits)
        return torch.stack([counts[1:] >= plan.min_pixels for counts in found])
    if labels is None:
        raise ValueError("the plan takes given image labels, but there are none")
    return labels > 0


def _label_map(row: Row, maps: dict[str, Tensor], present: Tensor, plan: Plan, image: Tensor) -> np.ndarray:
    kind, with_crf = row
    values = maps[kind]
    if with_crf:
        scores, ids = _seg_scores(values) if kind == "seg" else _present_scores(values, present)
        return crf_labels(scores, ids, to_uint8(image), plan.crf)
    labels = values.argmax(0) if kind == "seg" else threshold(values, present, plan.maps[kind].bkg)
    return labels.byte().cpu().numpy()


def _seg_scores(logits: Tensor) -> tuple[Tensor, Tensor]:
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


def _with_scale_1(scales: Sequence[float]) -> tuple[float, ...]:
    """The scales CAM and LAM are summed over: 1 is always one of them."""
    return tuple(scales) if 1.0 in scales else (1.0, *scales)
