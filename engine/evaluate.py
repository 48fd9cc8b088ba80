"""Scores the maps of a method on labelled images; one path for training's validation and for the tools.

A method is known by `localize`, `segment` and `classify` alone. Where each setting comes from stands in configs/default.yaml.
"""

import json
import math
import os
import time
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from omegaconf import DictConfig, OmegaConf
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset, Subset
from tqdm import tqdm

from engine import checkpoint
from engine.distributed import Ranks, all_reduce_sum, barrier
from engine.pictures import evaluation_picture, save_picture, to_uint8
from model.multi_scale import min_max, resize
from utils.crf import dense_crf
from utils.errors import UserError
from utils.images import write_label_png
from utils.metrics import Scores, confusion_matrix

KINDS = ("cam", "lam", "seg")
NAMES = {"cam": "CAM", "lam": "LAM", "seg": "segmentation", "fused": "CAM x LAM"}
VALIDATION_LAM_BKG = 0.5   # [code]
Row = tuple[str, bool]     # a map's kind, with or without CRF


class MapPlan(NamedTuple):
    """How one kind of map is made: scales, flip, background threshold (unused by the segmentation)."""

    scales: tuple[float, ...]
    flip: bool
    bkg: float = 0.0


class Plan(NamedTuple):
    """What is evaluated, and how.

    kinds: of the maps to score, out of `cam`, `lam`, `seg`, `fused`. base_size: side of the square images become; None:
    native size. predicted: None for given image labels, else where they come from (`classifier`, `segmentation`).
    crf: settings of the CRF, None for no CRF; with one, every map is scored without and with it.
    """

    kinds: tuple[str, ...]
    maps: dict[str, MapPlan]
    base_size: int | None
    predicted: str | None = None
    min_pixels: int = 1
    crf: dict | None = None

    @property
    def rows(self) -> list[Row]:
        return [(kind, crf) for kind in self.kinds for crf in ((False, True) if self.crf else (False,))]


class Prediction(NamedTuple):
    """One image: maps (K, H, W) in [0, 1], for `seg` logits (K+1, H, W); present: bool (K,), whose maps count;
    labels: the ids uint8 (H, W) of each row."""

    maps: dict[str, Tensor]
    present: Tensor
    labels: dict[Row, np.ndarray]


def evaluation_plan(config: DictConfig) -> Plan:
    """The plan of the evaluation tools: sections `evaluate` and `crf`. Raises UserError for maps that do not exist."""
    c = config.evaluate
    wrong = [kind for kind in c.maps if kind not in KINDS]
    if wrong or not c.maps:
        raise UserError(f"evaluate.maps = {list(c.maps)}: expected one or more of {', '.join(KINDS)}")
    cam, lam = (c.multi_scales, c.multi_scales) if c.multi_scale else (c.cam_scales, c.lam_scales)
    maps = {
        "cam": MapPlan(tuple(cam), c.flip, c.bkg),
        "lam": MapPlan(tuple(lam), c.flip, c.bkg),
        "seg": MapPlan(tuple(c.seg_scales), c.flip),
    }
    predicted = c.predict_from if c.image_labels == "predicted" else None
    kinds = tuple(dict.fromkeys(c.maps))
    return Plan(kinds, maps, c.base_size, predicted, c.min_pixels, OmegaConf.to_container(config.crf) if c.crf else None)


def validation_plan(config: DictConfig) -> Plan:
    """The plan of the validation in training (released code): squares, given labels, no CRF, CAM at its training scales.

    `fused` is the product of CAM and LAM, brought to [0, 1] per map again. Without a base size: squares of the crop size.
    """
    bkg = config.evaluate.bkg
    cam = MapPlan(tuple(config.pseudo_labels.cam_scales), True, bkg)
    maps = {"cam": cam, "lam": MapPlan((1.0,), False, VALIDATION_LAM_BKG), "seg": MapPlan((1.0,), False), "fused": cam}
    return Plan(("cam", "lam", "fused", "seg"), maps, config.evaluate.base_size or config.data.crop_size)


def validate(method: nn.Module, dataset: Dataset, config: DictConfig, ranks: Ranks) -> dict[str, float]:
    """mIoU (0..1) of `cam`, `lam`, `fused` and `seg` on the first train.validate_images images; the same on all ranks."""
    matrices = score(method, _first(dataset, config.train.validate_images), validation_plan(config), ranks,
                     config.data.workers, len(dataset.classes), "validate")
    return {kind: Scores(matrix).miou for (kind, _), matrix in matrices.items()}


def score(
    method: nn.Module, dataset: Dataset, plan: Plan, ranks: Ranks, workers: int, num_classes: int, title: str = "evaluate",
    save_labels: str | None = None, save_overlays: str | None = None,
) -> dict[Row, np.ndarray]:
    """Confusion matrix (K+1, K+1) of every row of the plan over the whole data set, the same on all ranks.

    Process r takes the images r, r + world, ...; counts are summed as integers, so that the number of processes changes
    nothing. save_labels, save_overlays: folders for label PNGs (FOLDER/MAP/NAME.png) and pictures (FOLDER/NAME.png).
    """
    matrices = {row: np.zeros((num_classes + 1, num_classes + 1), np.int64) for row in plan.rows}
    share = Subset(dataset, range(ranks.rank, len(dataset), ranks.world))
    loader = DataLoader(share, batch_size=None, collate_fn=_as_is, num_workers=workers, generator=torch.Generator())
    training = method.training
    method.eval()
    for item in tqdm(loader, title, disable=ranks.rank != 0, dynamic_ncols=True):
        prediction = predict(method, item.image.to(ranks.device), item.labels.to(ranks.device), plan, item.name)
        for row, labels in prediction.labels.items():
            matrices[row] += confusion_matrix(item.label_map, labels, num_classes + 1)
            if save_labels:
                write_label_png(Path(save_labels) / row_name(row) / f"{item.name}.png", labels)
        if save_overlays:
            _save_picture(Path(save_overlays) / f"{item.name}.png", item, prediction)
    method.train(training)
    total = all_reduce_sum(torch.from_numpy(np.stack(list(matrices.values()))).to(ranks.device)).cpu().numpy()
    return dict(zip(matrices, total, strict=True))


@torch.no_grad()
def predict(method: nn.Module, image: Tensor, labels: Tensor | None, plan: Plan, name: str = "image") -> Prediction:
    """Maps and label maps of one image (3, H, W), normalised, on the method's device.

    labels: its image-level labels (K,), not read where the plan predicts them. Maps are resized bilinearly to (H, W) and
    thresholded there. Raises UserError where a map is not finite.
    """
    size = image.shape[-2:]
    images = image[None] if plan.base_size is None else resize(image[None], (plan.base_size, plan.base_size))
    maps: dict[str, Tensor] = {}
    if "seg" in plan.kinds or plan.predicted == "segmentation":
        maps["seg"] = method.segment(images, plan.maps["seg"].scales, plan.maps["seg"].flip, size)[0]
    needed = [k for k in ("cam", "lam") if k in plan.kinds or "fused" in plan.kinds]
    coarse = {kind: method.localize(images, kind, plan.maps[kind].scales, plan.maps[kind].flip) for kind in needed}
    if "fused" in plan.kinds:
        coarse["fused"] = min_max(coarse["cam"] * coarse["lam"])
    maps.update({kind: resize(value, size)[0] for kind, value in coarse.items()})
    for kind, value in maps.items():
        if not value.isfinite().all():
            raise UserError(f"{name}: the {NAMES[kind]} is not finite; the weights are broken")
    present = _present_classes(method, images, labels, maps, plan)
    return Prediction(maps, present, {row: _label_map(row, maps, present, plan, image) for row in plan.rows})


def _present_classes(method: nn.Module, images: Tensor, labels: Tensor | None, maps: dict[str, Tensor], plan: Plan) -> Tensor:
    """bool (K,): the given labels; classes with logit > 0; or those with at least min_pixels in the segmentation."""
    if plan.predicted == "classifier":
        return method.classify(images)[0] > 0
    if plan.predicted == "segmentation":
        pixels = torch.bincount(maps["seg"].argmax(0).flatten(), minlength=len(maps["seg"]))
        return pixels[1:] >= plan.min_pixels
    if labels is None:
        raise ValueError("the plan uses given image labels, but there are none")
    return labels > 0


def _label_map(row: Row, maps: dict[str, Tensor], present: Tensor, plan: Plan, image: Tensor) -> np.ndarray:
    kind, with_crf = row
    if with_crf:
        return crf_labels(*_crf_scores(kind, maps[kind], present), to_uint8(image), plan.crf)
    if kind == "seg":
        return maps[kind].argmax(0).byte().cpu().numpy()
    return threshold(maps[kind], present, plan.maps[kind].bkg).byte().cpu().numpy()


def threshold(maps: Tensor, present: Tensor, bkg: float) -> Tensor:
    """Ids (H, W) of maps (K, H, W): the class of the largest present map, 0 where its value <= bkg."""
    if not present.any():
        return torch.zeros(maps.shape[-2:], dtype=torch.long, device=maps.device)
    ids = present.nonzero().flatten() + 1
    value, index = maps[present].max(0)
    return torch.where(value <= bkg, 0, ids[index])


def _crf_scores(kind: str, maps: Tensor, present: Tensor) -> tuple[Tensor, Tensor]:
    """Scores (C, H, W) for the CRF and their ids (C,): all classes for the segmentation, else background and present."""
    if kind == "seg":
        return maps.softmax(0), torch.arange(len(maps))
    chosen = maps[present]
    background = 1 - (chosen.amax(0, keepdim=True) if len(chosen) else torch.zeros_like(maps[:1]))
    return torch.cat([background, chosen]), torch.cat([torch.zeros(1, dtype=torch.long), present.nonzero().flatten().cpu() + 1])


def crf_labels(scores: Tensor, ids: Tensor, image: np.ndarray, settings: dict) -> np.ndarray:
    """Ids uint8 (H, W) after the dense CRF. scores (C, H, W) of `ids` (C,); image uint8 (H, W, 3)."""
    refined = dense_crf(image, scores.float().cpu().numpy(), **settings)
    return ids.numpy().astype(np.uint8)[refined.argmax(0)]


def evaluate(
    method: nn.Module, dataset: Dataset, config: DictConfig, ranks: Ranks, weights: str, results: Path | None = None
) -> list[dict]:
    """Evaluates as `config.evaluate` says, prints tables and a summary, appends the rows to the file `results`.

    dataset: of the split config.data.val_split. weights: the checkpoint's path, for the rows. Returns the rows, one a map
    with and without CRF: `map, dataset, split, images, scales, flip, crf, image_labels, miou, pixel_accuracy, iou,
    checkpoint, seconds`; scores in 0..1, None where a class is in neither map; image_labels None for the segmentation,
    which uses none; seconds: of the whole pass, which makes all rows together.
    """
    c, plan, started = config.evaluate, evaluation_plan(config), time.perf_counter()
    used = _first(dataset, c.images)
    matrices = score(method, used, plan, ranks, config.data.workers, len(dataset.classes), "evaluate",
                     c.save_labels, c.save_overlays)
    seconds = time.perf_counter() - started
    names, rows, lines = ("background", *dataset.classes), [], []
    for (kind, crf), matrix in matrices.items():
        scores = Scores(matrix)
        rows.append({
            "map": kind,
            "dataset": config.data.name,
            "split": config.data.val_split,
            "images": len(used),
            "scales": list(plan.maps[kind].scales),
            "flip": plan.maps[kind].flip,
            "crf": crf,
            "image_labels": None if kind == "seg" else ("predicted" if plan.predicted else "given"),
            "miou": _finite(scores.miou),
            "pixel_accuracy": _finite(scores.pixel_accuracy),
            "iou": {name: _finite(value) for name, value in zip(names, scores.iou, strict=True)},
            "checkpoint": weights,
            "seconds": round(seconds, 1),
        })
        heading = title(rows[-1], plan)
        lines.append(summary_line(scores, heading))
        if ranks.rank == 0:
            print(f"\n{table(scores, names, heading)}\n{lines[-1]}", flush=True)
    if ranks.rank == 0:
        print("\n" + "\n".join(["Summary", *lines]), flush=True)
        if results is not None:
            append_results(results, rows)
            print(f"results: {results}", flush=True)
    barrier()
    return rows


def row_name(row: Row) -> str:
    """`cam`, or with CRF `cam_crf`."""
    return row[0] + ("_crf" if row[1] else "")


def title(row: dict, plan: Plan) -> str:
    """What a score is of: map, data, split, images, scales, flip, CRF, image labels, threshold, size of the input."""
    scales = " ".join(f"{scale:g}" for scale in row["scales"])
    parts = [
        f"{NAMES[row['map']]}: {row['dataset']} {row['split']}, {row['images']} image{'s'[:row['images'] != 1]}",
        f"{'multi' if len(row['scales']) > 1 else 'single'} scale ({scales})",
        "flip" if row["flip"] else "no flip",
        "CRF" if row["crf"] else "no CRF",
    ]
    if row["image_labels"]:
        source = f" by the {plan.predicted}" if plan.predicted else ""
        parts.append(f"image labels {row['image_labels']}{source}")
        if not row["crf"]:
            parts.append(f"background {plan.maps[row['map']].bkg:g}")
    else:
        parts.append("no image labels used")
    parts.append("native size" if plan.base_size is None else f"input {plan.base_size}x{plan.base_size}")
    return ", ".join(parts)


def summary_line(scores: Scores, heading: str) -> str:
    """mIoU and pixel accuracy in percent, and what they are of."""
    present = int(scores.present.sum())
    return f"mIoU {100 * scores.miou:6.2f} over {present} classes present, pixel accuracy {100 * scores.pixel_accuracy:6.2f} | {heading}"


def table(scores: Scores, names: Sequence[str], heading: str) -> str:
    """Percent a class, FP/TP as a ratio; '-' where there is nothing to count."""
    width = max(len(name) for name in names)
    lines = [heading, f"{'class':<{width}}  {'IoU':>7}  {'precision':>9}  {'recall':>7}  {'FP/TP':>8}"]
    for i, name in enumerate(names):
        iou, precision, recall = (_cell(100 * values[i]) for values in (scores.iou, scores.precision, scores.recall))
        lines.append(f"{name:<{width}}  {iou:>7}  {precision:>9}  {recall:>7}  {_cell(scores.confusion[i]):>8}")
    return "\n".join(lines)


def append_results(path: Path, rows: list[dict]) -> None:
    """Appends rows to a results.json, a list; it is replaced as a whole. An unreadable one is kept under another name."""
    path.parent.mkdir(parents=True, exist_ok=True)
    earlier = []
    if path.exists():
        try:
            earlier = json.loads(path.read_text(encoding="utf-8"))
            if not isinstance(earlier, list):
                raise ValueError("no list")
        except ValueError:
            aside = path.with_name(f"{path.name}.unreadable-{time.time_ns()}")
            path.rename(aside)
            print(f"{path} cannot be read: kept as {aside.name}", flush=True)
            earlier = []
    part = path.with_name(path.name + ".part")
    part.write_text(json.dumps([*earlier, *rows], indent=1, allow_nan=False) + "\n", encoding="utf-8")
    os.replace(part, path)


def check_classes(path: str, num_classes: int) -> None:
    """Raises UserError where the checkpoint was made for another number of classes than the data has."""
    classes = checkpoint.read_meta(path).get("classes")
    if classes is not None:
        count = len(classes)
    else:
        weights = checkpoint.read_tensors(path)
        weights = weights.get("model_state_dict", weights)
        shapes = [value.shape for key, value in weights.items() if key.split(".")[-2:] == ["classifier", "weight"]]
        count = shapes[0][0] if shapes else num_classes
    if count != num_classes:
        raise UserError(
            f"{path} was made for {count} classes, the data has {num_classes} (data.name, data.classes): they must agree"
        )


def run_folder(path: str) -> Path:
    """The folder of the run a checkpoint belongs to: the parent of checkpoints/, else the checkpoint's own folder."""
    folder = Path(path).parent
    return folder.parent if folder.name == "checkpoints" else folder


def _save_picture(path: Path, item, prediction: Prediction) -> None:
    heat = {
        NAMES[kind]: (values * prediction.present[:, None, None]).amax(0).cpu().numpy()
        for kind, values in prediction.maps.items() if kind != "seg"
    }
    labels = {NAMES[k] + (", CRF" if crf else ""): ids for (k, crf), ids in prediction.labels.items() if crf or k == "seg"}
    picture = evaluation_picture(to_uint8(item.image), item.label_map, heat, labels)
    save_picture(path, picture)


def _first(dataset: Dataset, count: int | None) -> Dataset:
    return dataset if count is None or count >= len(dataset) else Subset(dataset, range(count))


def _as_is(item):
    return item


def _finite(value: float) -> float | None:
    return float(value) if math.isfinite(value) else None


def _cell(value: float) -> str:
    return "-" if math.isnan(value) else f"{value:.2f}"
