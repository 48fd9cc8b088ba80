"""Pictures for people: panels side by side, each with its caption."""

from collections.abc import Sequence
from pathlib import Path

import cv2
import numpy as np
import torch
from PIL import Image
from torch import nn

from datasets import EvalItem
from engine.evaluation.results import NAMES
from engine.inference.predict import Prediction, evaluation_mode
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


def prediction_panels(item: EvalItem, prediction: Prediction) -> Panels:
    """Input, mask, heat maps of the present classes, segmentation, and what the CRF made of them."""
    present = prediction.present[:, None, None]
    heat = {NAMES[k]: (v * present).amax(0).cpu().numpy() for k, v in prediction.maps.items() if k != "seg"}
    drawn = {row: ids for row, ids in prediction.labels.items() if row[1] or row[0] == "seg"}
    labels = {NAMES[kind] + (", CRF" if crf else ""): ids for (kind, crf), ids in drawn.items()}
    return image_panels(to_uint8(item.image), item.label_map, heat, labels)


@torch.no_grad()
def training_picture(method: nn.Module, batch: Batch, classes: Sequence[str], count: int = 2) -> np.ndarray:
    """The first `count` images of a batch below each other: input, CAM and LAM of the labelled classes, segmentation.

    Single scale, no flip; the method is left in the mode it was in. Returns uint8 (H, W, 3).
    """
    images, labels = batch.images[:count], batch.labels[:count]
    with evaluation_mode(method):
        maps = {kind: method.localize(images, kind, [1.0], False) * labels[:, :, None, None] for kind in ("cam", "lam")}
        segmentation = method.segment(images, [1.0], False).argmax(1)
    rows = []
    for i, image in enumerate(images):
        heat = {kind.upper(): values[i].amax(0).cpu().numpy() for kind, values in maps.items()}
        seg = segmentation[i].byte().cpu().numpy()
        row = side_by_side(image_panels(to_uint8(image), None, heat, {"segmentation": seg}))
        present = ", ".join(name for name, label in zip(classes, labels[i].tolist(), strict=True) if label)
        rows.append(np.concatenate([row, _strip(present or "no label", row.shape[1])]))
    return np.concatenate(rows)


def save_picture(path: Path, picture: np.ndarray) -> None:
    """Writes uint8 (H, W, 3) in the format of the name's ending; makes the folder."""
    with replacing(path) as part:
        Image.fromarray(picture).save(part, Image.registered_extensions()[path.suffix.lower()], quality=90)


def _with_caption(caption: str, panel: np.ndarray) -> np.ndarray:
    return np.concatenate([_strip(caption, panel.shape[1]), panel])


def _strip(text: str, width: int) -> np.ndarray:
    """A white strip (STRIP, width, 3) with black text."""
    strip = np.full((STRIP, width, 3), 255, np.uint8)
    cv2.putText(strip, text, (4, STRIP - 8), cv2.FONT_HERSHEY_SIMPLEX, 0.45, (0, 0, 0), 1, cv2.LINE_AA)
    return strip
