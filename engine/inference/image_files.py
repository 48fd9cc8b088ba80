"""Predictions for images that a user names, without masks: label maps, overlays, heat maps, class scores.

    FOLDER/json/NAME.json            written last: class scores, present classes, share of the pixels of each class
    FOLDER/labels/KIND/NAME.png      ids in the VOC palette, at the image's size; KIND_crf after the dense CRF
    FOLDER/overlays/KIND/NAME.jpg    the same over the image
    FOLDER/heat/KIND/CLASS/NAME.jpg  of every present class, for kinds of maps that a threshold decides
"""

import json
from collections.abc import Sequence
from pathlib import Path

import cv2
import numpy as np
import torch

from datasets import FileItem, ImageFiles, unique_names
from engine.inference.batch import Prediction, on_host
from engine.inference.pictures import save_picture
from engine.inference.plan import Plan, row_name, title_of
from engine.inference.prediction_folder import Predictor, Written
from utils.errors import UserError
from utils.files import replacing
from utils.images import heatmap, overlay, to_uint8, write_label_png

LEAST_SIDE = 32        # pixels at the smallest scale, where the shape stays: a patch, and no less, fits
MOST_PIXELS = 1_000_000


def predict_files(
    predictor: Predictor, found: Sequence[tuple[Path, Path]], folder: Path, labels: str | None = None,
    most_pixels: int = MOST_PIXELS, overwrite: bool = False,
) -> Written:
    """Predicts the images `found` (of `datasets.find_images`) into `folder`.

    labels: the classes in all of them, as 'cat,dog'; None: they are predicted. most_pixels: larger images are reduced
    to this many, their ids enlarged again. Raises UserError for a class that the checkpoint does not have, and where a
    file in the folder is another image's.
    """
    plan = predictor.plan = predictor.plan._replace(class_logits=True)
    given = given_labels(labels, predictor.classes) if labels else None
    if given is None and plan.predicted is None:
        raise UserError("evaluate.image_labels=given: say which with --labels cat,dog")
    if given is not None and plan.predicted is not None:
        raise UserError("--labels gives the image labels: evaluate.image_labels=predicted does not go with it")
    names, paths = unique_names(found), [image for _, image in found]
    path_of = dict(zip(names, paths, strict=True))
    dataset = ImageFiles(paths, names, given, least_side(plan), most_pixels, plan.input_size)
    is_done = predictor.claim(folder, overwrite, {"labels": labels, "most_pixels": most_pixels})

    def finished(name: str) -> bool:
        return is_done(_json_path(folder, name)) and _is_of(_json_path(folder, name), path_of[name])

    write = _Writer(folder, predictor.classes, plan, predictor.config.method)
    return predictor.write(dataset, write, finished, "predict", lambda _, predictions: on_host(predictions, plan))


def given_labels(text: str, classes: Sequence[str]) -> torch.Tensor:
    """'cat,dog' -> multi-hot float32 (K,). Raises UserError for a class that is none of `classes`."""
    labels = torch.zeros(len(classes))
    for name in (part.strip() for part in text.split(",")):
        if name not in classes:
            raise UserError(f"--labels: the checkpoint has no class '{name}'; it has {', '.join(classes)}")
        labels[classes.index(name)] = 1
    return labels


def least_side(plan: Plan) -> int:
    """The shortest side of an input of scale 1, in pixels, that goes through the network."""
    if plan.base_size is not None:
        return 1
    return int(LEAST_SIDE / min(min(plan.maps[kind].scales) for kind in plan.kinds))


class _Writer:
    """Writes what became of an image; called by several threads."""

    def __init__(self, folder: Path, classes: Sequence[str], plan: Plan, method: str) -> None:
        self.folder, self.classes, self.plan = folder, classes, plan
        self.source = plan.predicted and title_of(method, plan.predicted)

    def __call__(self, item: FileItem, prediction: Prediction) -> None:
        image = to_uint8(item.image)
        shares = {}
        for row, ids in prediction.labels.items():
            drawn, full = row_name(row), _enlarged(ids, item.size)
            write_label_png(self.folder / "labels" / drawn / f"{item.name}.png", full)
            save_picture(self.folder / "overlays" / drawn / f"{item.name}.jpg", overlay(image, ids))
            shares[drawn] = self._shares(full)
        for kind, declared in self.plan.kinds.items():
            if not declared.background:
                self._save_heat(kind, item.name, prediction, image)
        self._save_json(item, prediction, shares)

    def _shares(self, ids: np.ndarray) -> dict[str, float]:
        """{class or background: share of the pixels}, of those that have any."""
        counts = np.bincount(ids.ravel(), minlength=len(self.classes) + 1)
        names = ("background", *self.classes)
        return {name: count / ids.size for name, count in zip(names, counts.tolist(), strict=True) if count}

    def _save_heat(self, kind: str, name: str, prediction: Prediction, image: np.ndarray) -> None:
        present = prediction.present.nonzero().flatten().tolist()
        for index, values in zip(present, prediction.maps[kind].numpy(), strict=True):
            folder = self.folder / "heat" / kind / self.classes[index].replace("/", "_")
            save_picture(folder / f"{name}.jpg", heatmap(values, image))

    def _save_json(self, item: FileItem, prediction: Prediction, shares: dict) -> None:
        scores = prediction.class_logits.sigmoid().tolist()
        present = [self.classes[index] for index in prediction.present.nonzero().flatten().tolist()]
        entry = {
            "image": str(item.path), "height": item.size[0], "width": item.size[1],
            "computed": list(item.image.shape[1:]),
            "image_labels": f"predicted by the {self.source}" if self.source else "given",
            "present": present, "scores": dict(zip(self.classes, scores, strict=True)), "shares": shares,
        }
        with replacing(_json_path(self.folder, item.name)) as part:
            part.write_text(json.dumps(entry, indent=1) + "\n", encoding="utf-8")


def _json_path(folder: Path, name: str) -> Path:
    return folder / "json" / f"{name}.json"


def _is_of(path: Path, image: Path) -> bool:
    """Raises UserError where a JSON file is of another image."""
    of = json.loads(path.read_text(encoding="utf-8"))["image"]
    if of != str(image):
        raise UserError(f"{path}: is of {of}, not of {image}; give another --output, or --overwrite")
    return True


def _enlarged(ids: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """Ids (h, w) at the size (H, W): each pixel takes the nearest's."""
    return ids if ids.shape == size else cv2.resize(ids, size[::-1], interpolation=cv2.INTER_NEAREST_EXACT)
