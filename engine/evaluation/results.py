"""What an evaluation tells: rows of results.json, tables, and lines that say what each number is of."""

import json
import math
import time
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from datasets import data_name
from engine.config import DEFAULT_METHOD, RunConfig
from engine.inference.plan import Plan, Row, title_of
from utils.errors import UserError
from utils.files import alone, replacing
from utils.metrics import Scores


def scores_of(matrix: np.ndarray, split: str) -> Scores:
    """Raises UserError where the ground truth of a split shows no class: any model would get it right."""
    if not matrix[1:].any():
        raise UserError(f"split {split}: no pixel of a class to score, only background and ignored ones (255)")
    return Scores(matrix)


def score_entries(scores: Scores, names: Sequence[str]) -> dict:
    """The scores of a row, shares in 0..1; what is not finite is None (the IoU of a class in neither map)."""
    return {
        "miou": _finite(scores.miou),
        "pixel_accuracy": _finite(scores.pixel_accuracy),
        "iou": {name: _finite(value) for name, value in zip(names, scores.iou, strict=True)},
    }


def facts_of(config: RunConfig, split: str, images: int) -> dict:
    """The entries of a result's row that say which images it is of, and of which method."""
    return {"method": config.method, "dataset": data_name(config.data), "split": split, "images": images}


def settings_of(row: Row, plan: Plan, facts: dict) -> dict:
    """The entries of a result's row that say what it is of.

    facts: those of `facts_of`.
    """
    kind, crf = row
    made, declared = plan.maps[kind], plan.kinds[kind]
    labels = None if not declared.uses_labels else "predicted" if plan.predicted else "given"
    how = {"scales": list(made.scales), "flip": made.flip, "crf": crf, "image_labels": labels}
    more = {
        "predicted_from": plan.predicted if labels == "predicted" else None,
        "background": None if declared.background or crf else made.bkg,
        "input": plan.base_size,
        "precision": plan.precision,
    }
    rare = {"long_side": plan.long_side} if plan.long_side else {}
    if crf and not declared.background and plan.background_power != 1:
        rare["background_power"] = plan.background_power
    rare |= {"settings": plan.settings[kind]} if kind in (plan.settings or {}) else {}
    return {"map": kind, **facts, **how, **more, **rare}


def title(row: dict) -> str:
    """What the scores of a row are of: map, data, split, images, scales, flip, CRF, image labels, background, input.

    Rows of early evaluations do not name their method: it was the default one.
    """
    method = row.get("method", DEFAULT_METHOD)
    scales, labels, count = row["scales"], row["image_labels"], row["images"]
    parts = [
        f"{title_of(method, row['map'])}: {row['dataset']} {row['split']}",
        f"{count} image{'s' if count != 1 else ''}",
        f"{'multi' if len(scales) > 1 else 'single'} scale ({' '.join(f'{scale:g}' for scale in scales)})",
        "flip" if row["flip"] else "no flip",
        "CRF" if row["crf"] else "no CRF",
        f"image labels {labels}" if labels else "no image labels used",
    ]
    return ", ".join([*parts, *_details(row, method)])


def summary_line(scores: Scores, heading: str) -> str:
    """mIoU and pixel accuracy in percent, and what they are of."""
    miou, accuracy, present = 100 * scores.miou, 100 * scores.pixel_accuracy, int(scores.present.sum())
    return f"mIoU {miou:6.2f} over {present} classes present, pixel accuracy {accuracy:6.2f} | {heading}"


def table(scores: Scores, names: Sequence[str], heading: str) -> str:
    """IoU, precision and recall of every class in percent, FP/TP as a ratio; '-' where there is nothing to count."""
    width = max(len(name) for name in ("class", *names))
    lines = [heading, f"{'class':<{width}}  {'IoU':>7}  {'precision':>9}  {'recall':>7}  {'FP/TP':>9}"]
    for name, iou, precision, recall, confusion in zip(
        names, scores.iou, scores.precision, scores.recall, scores.confusion, strict=True
    ):
        shares = f"{_cell(100 * iou):>7}  {_cell(100 * precision):>9}  {_cell(100 * recall):>7}"
        lines.append(f"{name:<{width}}  {shares}  {_cell(confusion):>9}")
    return "\n".join([*lines, summary_line(scores, heading)])


def append_results(path: Path, rows: list[dict]) -> None:
    """Appends rows to the list in a results.json, replacing the file as a whole; other processes wait.

    A file that cannot be read as a list is kept under another name. Raises UserError where nothing can be written.
    """
    with alone(path):
        _append(path, rows)


def _append(path: Path, rows: list[dict]) -> None:
    earlier = []
    if path.exists():
        try:
            earlier = json.loads(path.read_text(encoding="utf-8"))
            json.dumps(earlier, allow_nan=False)   # numbers that are not finite cannot be written again
        except (ValueError, RecursionError):
            earlier = None
        if not isinstance(earlier, list):
            aside = path.with_name(f"{path.name}.unreadable-{time.time_ns()}")
            path.rename(aside)
            print(f"{path} cannot be read as a list of results: kept as {aside.name}", flush=True)
            earlier = []
    with replacing(path) as part:
        part.write_text(json.dumps([*earlier, *rows], indent=1, allow_nan=False) + "\n", encoding="utf-8")


def _details(row: dict, method: str) -> list[str]:
    """The entries that rows of early evaluations do not have."""
    source, bkg, power = row.get("predicted_from"), row.get("background"), row.get("background_power")
    parts = [f"predicted by the {title_of(method, source)}"] if source else []
    parts += [f"background {bkg:g}"] if bkg is not None else []
    parts += [f"background power {power:g}"] if power is not None else []
    parts += [f"best of {row['best_of']} backgrounds on this split"] if row.get("best_of") else []
    parts += [f"{key}={value}" for key, value in row.get("settings", {}).items()]
    side, long_side = row.get("input"), row.get("long_side")
    size = f"input {side}x{side}" if side else f"long side {long_side}" if long_side else "native size"
    parts += [size] if "input" in row else []
    return parts + ["bf16"] if row.get("precision") == "bf16" else parts


def _finite(value: float) -> float | None:
    return float(value) if math.isfinite(value) else None


def _cell(value: float) -> str:
    return "-" if math.isnan(value) else f"{value:.2f}"
