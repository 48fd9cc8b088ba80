"""The score of every image of an evaluation, and pictures of the best and the worst: what a report shows of them."""

import bisect
import io
import itertools
import json
import math
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
from PIL import Image

from datasets import EvalItem
from engine.distributed import gather
from engine.inference.batch import Prediction
from engine.inference.pictures import Panels, prediction_panels
from engine.inference.plan import Plan, Row, row_name
from utils.files import naming, replacing
from utils.images import IGNORE
from utils.metrics import Scores

EVALUATIONS = "evaluation"   # folder of a run's folder
SIDE, QUALITY = 320, 80   # longest side of a picture, pixels, and its JPEG quality


class Shown(NamedTuple):
    """An image worth looking at: its name, ids of its classes in the mask and in any label map, and (caption, JPEG)."""

    name: str
    ids: list[int]
    panels: list[tuple[str, bytes]]


class ImageScores:
    """Collects them while a data set is scored.

    plan: of the evaluation; the last of its label maps of the kind `best_by`, else of all, ranks the images.
    count: how many of the best and of the worst images get pictures; only these are kept in memory.
    The score of an image is its mIoU over the ids of its mask; one without a counted pixel has none and is not ranked.
    """

    def __init__(self, plan: Plan, best_by: str, count: int) -> None:
        self.ranked_by = ([row for row in plan.rows if row[0] == best_by] or plan.rows)[-1]
        self.plan, self.count = plan, count
        self.scores: list[tuple[str, dict[str, float | None]]] = []
        self._ends: list[tuple[tuple[float, str], Shown]] = []   # the best, then the worst, from the best on

    def add(self, item: EvalItem, prediction: Prediction, matrices: Mapping[Row, np.ndarray]) -> None:
        """One image, with the confusion matrix (K+1, K+1) of each of its label maps."""
        mious = {row: Scores(matrix).miou for row, matrix in matrices.items()}
        self.scores.append((item.name, {row_name(row): _finite(miou) for row, miou in mious.items()}))
        rank = mious[self.ranked_by]
        key = (-rank, item.name)
        full = len(self._ends) == 2 * self.count
        if math.isfinite(rank) and not (full and bisect.bisect(self._ends, key, key=_key) == self.count):
            bisect.insort(self._ends, (key, _shown(item, prediction, self.plan)), key=_key)
            self._drop_the_middle()

    def gather(self) -> None:
        """Makes it that of all processes; all of them call it. Their number changes nothing."""
        parts = gather((self.scores, self._ends))
        self.scores = sorted((entry for scores, _ in parts for entry in scores), key=_key)
        self._ends = sorted((entry for _, ends in parts for entry in ends), key=_key)
        self._drop_the_middle()

    def write(self, folder: Path, classes: Sequence[str]) -> None:
        """Writes images.json and the JPEGs it names. classes: names, without background.

        images.json: `ranked_by`; `images`, a list of {name, score {row: mIoU or null}} in the order of their names;
        `best`, from the best, and `worst`, from the worst, lists of {name, classes, panels [{caption, file}]}. An image
        is never in both.
        """
        shown, names = [shown for _, shown in self._ends], ("background", *classes)
        best, worst = shown[: self.count], shown[self.count :][::-1]
        content = {
            "ranked_by": row_name(self.ranked_by),
            "images": [{"name": name, "score": score} for name, score in self.scores],
            "best": [_write(one, folder, f"best_{index}", names) for index, one in enumerate(best, 1)],
            "worst": [_write(one, folder, f"worst_{index}", names) for index, one in enumerate(worst, 1)],
        }
        with replacing(folder / "images.json") as part:
            part.write_text(json.dumps(content, indent=1, allow_nan=False) + "\n", encoding="utf-8")

    def _drop_the_middle(self) -> None:
        del self._ends[self.count : max(len(self._ends) - self.count, self.count)]


def new_evaluation(run: Path) -> str:
    """Makes a folder of its own for an evaluation, in `evaluation/` of a run's folder; its name begins with the time.

    Raises UserError where it cannot be made.
    """
    name = time.strftime("%Y%m%d-%H%M%S")
    with naming(run / EVALUATIONS):
        for attempt in itertools.count(2):
            try:
                (run / EVALUATIONS / name).mkdir(parents=True)
                return name
            except FileExistsError:
                name = f"{name.partition('_')[0]}_{attempt}"


def write_evaluation(
    run: Path, name: str, matrices: Mapping[Row, np.ndarray], classes: Sequence[str], image_scores: ImageScores
) -> None:
    """Writes confusion.npz, int64 (K+1, K+1) by the row's name and `classes` with background, and images.json."""
    folder = run / EVALUATIONS / name
    named = {row_name(row): matrix for row, matrix in matrices.items()}
    with replacing(folder / "confusion.npz") as part, open(part, "wb") as file:
        np.savez_compressed(file, classes=np.array(["background", *classes]), **named)
    image_scores.write(folder, classes)


def _shown(item: EvalItem, prediction: Prediction, plan: Plan) -> Shown:
    ids = np.unique(np.concatenate([item.label_map.ravel(), *(ids.ravel() for ids in prediction.labels.values())]))
    panels: Panels = prediction_panels(item, prediction, plan)
    return Shown(item.name, ids[ids != IGNORE].tolist(), [(caption, _jpeg(panel)) for caption, panel in panels])


def _jpeg(panel: np.ndarray) -> bytes:
    image, file = Image.fromarray(panel), io.BytesIO()
    image.thumbnail((SIDE, SIDE))
    image.save(file, "JPEG", quality=QUALITY)
    return file.getvalue()


def _write(shown: Shown, folder: Path, prefix: str, names: Sequence[str]) -> dict:
    panels = []
    for index, (caption, jpeg) in enumerate(shown.panels):
        file = f"{prefix}_{index}.jpg"
        with replacing(folder / file) as part:
            part.write_bytes(jpeg)
        panels.append({"caption": caption, "file": file})
    return {"name": shown.name, "classes": {names[i]: i for i in shown.ids}, "panels": panels}


def _key(entry: tuple) -> tuple[float, str] | str:
    return entry[0]


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None
