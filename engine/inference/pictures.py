"""Pictures for people: panels side by side, each with its caption."""

import io
from collections.abc import Sequence
from pathlib import Path

import cv2
import numpy as np
import torch
from PIL import Image

from datasets import EvalItem
from engine.config import RunConfig
from engine.inference.batch import Prediction, evaluation_mode, on_host, predict_batch
from engine.inference.plan import Plan, evaluation_plan, precision_of
from model.method import MapPlan, Method
from utils.batch import Batch
from utils.files import replacing
from utils.images import heatmap, overlay, to_uint8

SMALLEST = 192   # panels of smaller images are enlarged
STRIP = 24       # height of the captions, pixels
GAP = 4          # between panels
Panels = list[tuple[str, np.ndarray]]   # caption, uint8 (H, W, 3)


def side_by_side(panels: Panels) -> np.ndarray:
    """Panels of one size -> one picture, uint8."""
    factor = max(1, round(SMALLEST / min(panels[0][1].shape[:2])))
    drawn = [_with_caption(caption, panel.repeat(factor, 0).repeat(factor, 1)) for caption, panel in panels]
    gap = np.full((len(drawn[0]), GAP, 3), 255, np.uint8)
    return np.concatenate([part for panel in drawn for part in (panel, gap)][:-1], axis=1)


def image_panels(
    image: np.ndarray, truth: np.ndarray | None, maps: dict[str, np.ndarray], labels: dict[str, np.ndarray]
) -> Panels:
    """Input, mask (where given), heat maps (H, W) in [0, 1] by caption, label maps (H, W) by caption."""
    panels = [("input", image)]
    if truth is not None:
        panels.append(("mask", overlay(image, truth)))
    panels += [(caption, heatmap(values, image)) for caption, values in maps.items()]
    return panels + [(caption, overlay(image, label_map)) for caption, label_map in labels.items()]


def prediction_panels(item: EvalItem, prediction: Prediction, plan: Plan) -> Panels:
    """Input, mask, heat maps of the present classes, label maps of kinds with background, and what the CRF made.

    prediction: of `on_host`.
    """
    heat, drawn = {}, {}
    for kind, declared in plan.kinds.items():
        if not declared.background:
            maps = prediction.maps[kind]
            heat[declared.title] = torch.cat([maps.new_zeros(1, *maps.shape[1:]), maps]).amax(0).numpy()
    for (kind, crf), ids in prediction.labels.items():
        if crf or plan.kinds[kind].background:
            drawn[plan.kinds[kind].title + (", CRF" if crf else "")] = ids
    return image_panels(to_uint8(item.image), item.label_map, heat, drawn)


def training_picture(
    method: Method, batch: Batch, classes: Sequence[str], config: RunConfig, count: int = 2
) -> np.ndarray:
    """The first `count` images of a batch below each other: input, and the maps of an evaluation.

    Single scale, no flip; the method is left in the mode it was in. Returns uint8 (H, W, 3).
    """
    images, labels = batch.images[:count], batch.labels[:count]
    kinds = evaluation_plan(config).kinds
    maps = {kind: MapPlan(bkg=config.evaluate.bkg) for kind in kinds}
    plan = Plan(kinds, maps, None, precision=precision_of(config))
    with evaluation_mode(method):
        predictions = on_host(predict_batch(method, images, labels, plan, batch.names[:count]), plan)
    rows = []
    for image, label, prediction in zip(images, labels.tolist(), predictions, strict=True):
        row = side_by_side(prediction_panels(EvalItem("", image, None, None), prediction, plan))
        present = ", ".join(name for name, there in zip(classes, label, strict=True) if there)
        rows.append(np.concatenate([row, _strip(present or "no label", row.shape[1])]))
    return np.concatenate(rows)


def save_picture(path: Path, picture: np.ndarray) -> None:
    """Writes uint8 (H, W, 3) in the format of the name's ending; makes the folder."""
    file = io.BytesIO()   # PIL itself would take no notice of a file that is cut short by a full disk
    Image.fromarray(picture).save(file, Image.registered_extensions()[path.suffix.lower()], quality=90)
    with replacing(path, durable=False) as part:
        part.write_bytes(file.getvalue())


def _with_caption(caption: str, panel: np.ndarray) -> np.ndarray:
    return np.concatenate([_strip(caption, panel.shape[1]), panel])


def _strip(text: str, width: int) -> np.ndarray:
    """A white strip (STRIP, width, 3) with black text."""
    strip = np.full((STRIP, width, 3), 255, np.uint8)
    cv2.putText(strip, text, (4, STRIP - 8), cv2.FONT_HERSHEY_SIMPLEX, 0.45, (0, 0, 0), 1, cv2.LINE_AA)
    return strip
