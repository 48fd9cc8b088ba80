"""The mIoU of thresholded maps at every background threshold, from one pass over the images.

Each image is counted into one histogram: true id, winner (the present class whose map is largest), and bin, the number
of thresholds below the winner's value. Summed over the images and cumulated over the bins, it is the confusion matrix
at every threshold, to the pixel that of `threshold`.
"""

import json
import math
import time
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from datasets import EvalItem, build_val_set
from engine.alike import check_same
from engine.checkpoints.files import check_classes, read_meta
from engine.distributed import Ranks, all_reduce_sum, barrier, gather, loader_workers, use_tf32
from engine.evaluation.checkpoint import results_folder
from engine.evaluation.evaluate import first_images, share_loader
from engine.evaluation.image_scores import EVALUATIONS, ImageScores, new_evaluation, write_evaluation
from engine.evaluation.results import (
    append_results,
    facts_of,
    score_entries,
    scores_of,
    settings_of,
    summary_line,
    title,
)
from engine.inference.batch import Prediction, present_maps, to_host
from engine.inference.many import over_images
from engine.inference.plan import Plan, kinds_of
from engine.inference.prediction_folder import Predictor
from model.method import Method
from utils.errors import UserError
from utils.files import replacing
from utils.images import IGNORE
from utils.metrics import Scores
from utils.progress import progress_bar

COUNT, EPSILON = 100, 1e-10   # [acr]
THRESHOLDS = tuple(index / COUNT for index in range(COUNT))   # [acr]
BOUNDARIES = torch.tensor(THRESHOLDS, dtype=torch.float64)
PRINTED, BAR = 5, 40   # every fifth threshold gets a line; letters of the longest bar


class Curve(NamedTuple):
    """A kind of map: row of results.json and scores at the best threshold, the first maximum of miou, float64 (100,).

    miou_all: the mean over all K+1 ids, as ACR counts, where one that the ground truth lacks counts 0.
    """

    row: dict
    scores: Scores
    miou: np.ndarray
    miou_all: np.ndarray


def sweep_checkpoint(
    ranks: Ranks, checkpoint: str, settings: Sequence[str] = (), config: str | None = None,
    kinds: Sequence[str] | None = None, write: bool = False,
) -> tuple[dict[str, Curve], Path | None]:
    """The curves by kind on the split data.val_split, the same on all ranks, and the folder where one was written.

    checkpoint, settings, config: as `open_checkpoint` takes them; evaluate.bkg has no part. kinds: None for the
    thresholded ones of evaluate.maps. write: appends the rows at the best thresholds to the results.json of the
    checkpoint's run, and makes a folder of its evaluation/ with their matrices and sweep.json. Raises UserError.
    """
    predictor = Predictor(ranks, checkpoint, settings, config, kinds)
    config, file, method = predictor.config, predictor.file, predictor.method
    plan, split = _thresholded(predictor.plan, config.method, bool(kinds)), config.data.val_split
    dataset, run = build_val_set(config), results_folder(checkpoint, file)
    check_same(dataset.facts())
    check_classes(file, dataset.classes)
    images, names = first_images(dataset, config.evaluate.images), ("background", *dataset.classes)
    evaluation = gather(new_evaluation(run) if write and ranks.rank == 0 else None)[0]
    use_tf32(config.train.tf32)
    started, workers, batch_size = time.perf_counter(), loader_workers(config, ranks), config.evaluate.images_at_once
    counts, curves = count(method, images, len(dataset.classes), plan, ranks, workers, batch_size), {}
    facts = facts_of(config, split, len(images))
    made_of = {"checkpoint": file, "iteration": read_meta(file).get("iteration"),
               "seconds": round(time.perf_counter() - started, 1), "evaluation": evaluation, "best_of": COUNT}
    for kind, matrices in counts.items():
        scores = [scores_of(matrix, split) for matrix in matrices]
        miou = np.array([each.miou for each in scores])
        best = int(miou.argmax())
        row = {**settings_of((kind, False), plan, facts), "background": THRESHOLDS[best]}
        row |= {**score_entries(scores[best], names), **made_of}
        curves[kind] = Curve(row, scores[best], miou, acr_iou(matrices).mean(1))
    folder = run / EVALUATIONS / evaluation if write else None
    if write and ranks.rank == 0:
        append_results(run / "results.json", [curve.row for curve in curves.values()])
        at_best = {(kind, False): curve.scores.matrix for kind, curve in curves.items()}
        no_images = ImageScores(plan, method.best_by, 0)   # theirs are not kept at every threshold
        write_evaluation(run, evaluation, at_best, dataset.classes, no_images)
        maps = {kind: {"of": title(row), "best": row["background"], "miou": miou.tolist(), "miou_all": of_all.tolist()}
                for kind, (row, _, miou, of_all) in curves.items()}
        with replacing(folder / "sweep.json") as part:
            part.write_text(json.dumps({"thresholds": THRESHOLDS, "maps": maps}, indent=1), encoding="utf-8")
    barrier()
    return curves, folder


def count(
    method: Method, dataset: Dataset, num_classes: int, plan: Plan, ranks: Ranks, workers: int = 0,
    batch_size: int | None = None,
) -> dict[str, np.ndarray]:
    """Confusion matrices int64 (100, K+1, K+1) of every kind of the plan, the same on all ranks; see `score`."""
    totals = np.zeros((len(plan.kinds), num_classes + 1, num_classes, COUNT + 1), np.int64)
    loader = share_loader(dataset, ranks, workers)

    def counted(items: list[EvalItem], predictions: list[Prediction]) -> list[tuple[list[int], np.ndarray]]:
        pairs = [(torch.tensor(item.label_map), one) for item, one in zip(items, predictions, strict=True)]
        found = [[histogram(one.maps[kind], one.present, truth) for kind in plan.kinds] for truth, one in pairs]
        host = to_host(*map(torch.stack, found))
        return [(winners(one.present), own.numpy()) for one, own in zip(predictions, host, strict=True)]

    bar = progress_bar(desc="sweep", total=len(loader), disable=ranks.rank != 0)
    given = method, loader, plan, ranks.device, lambda _, taken: taken, batch_size
    with bar, over_images(*given, take=counted) as results:
        for classes, counts in results:
            totals[:, :, classes] += counts
            bar.update()
    summed = all_reduce_sum(torch.from_numpy(totals).to(ranks.device)).cpu().numpy()
    return dict(zip(plan.kinds, map(matrices_of, summed), strict=True))


def histogram(maps: Tensor, present: Tensor, truth: Tensor) -> Tensor:
    """Pixels int64 (K+1, C, 101) by true id, one of the C `winners`, and bin, on the device of the maps (K, H, W).

    present: bool (K,), on the CPU; where none is, all lie in bin 0. truth: uint8 (H, W), 255 is skipped.
    """
    rows, truth = len(maps) + 1, truth.to(maps.device, non_blocking=True).long()
    own = present_maps(maps, present) if present.any() else torch.full_like(maps[:1], -math.inf)
    value, winner = own.max(0)
    bins = torch.bucketize(value, BOUNDARIES.to(value, non_blocking=True))
    size = rows * len(own) * (COUNT + 1)
    cells = torch.where(truth == IGNORE, size, (truth * len(own) + winner) * (COUNT + 1) + bins).flatten()
    counts = cells.new_zeros(size + 1).scatter_add_(0, cells, torch.ones_like(cells))
    return counts[:-1].view(rows, len(own), COUNT + 1)


def winners(present: Tensor) -> list[int]:
    """The classes that a histogram counts, from 0: the present ones; the first, which never wins, where none is."""
    return present.nonzero().flatten().tolist() or [0]


def matrices_of(counts: np.ndarray) -> np.ndarray:
    """Confusion matrices int64 (100, K+1, K+1), of every threshold, of a histogram (K+1, K, 101)."""
    above = counts[..., ::-1].cumsum(-1)[..., ::-1][..., 1:]   # a pixel of bin b is above the first b thresholds
    background = counts.sum((1, 2))[:, None] - above.sum(1)
    return np.concatenate([background[:, None], above], 1).transpose(2, 0, 1)


def acr_iou(matrices: np.ndarray) -> np.ndarray:
    """IoU (..., K+1) as ACR's evaluation counts it, of confusion matrices (..., K+1, K+1): 0 for an id in no map."""
    hit = matrices.diagonal(axis1=-2, axis2=-1)
    return hit / (matrices.sum(-1) + matrices.sum(-2) - hit + EPSILON)


def curve_text(curve: Curve) -> str:
    """Every fifth threshold and the best with both mIoUs in percent and a bar, and what the best is of."""
    row, scores, miou, of_all = curve
    best, ids, longest = int(miou.argmax()), len(scores.iou), BAR / max(miou.max(), EPSILON)
    lines = [title({**row, "background": None, "best_of": None}), f"background  {'mIoU':>6}  all {ids}"]
    for i in sorted({*range(0, COUNT, PRINTED), best}):
        bar = "#" * round(longest * miou[i]) + (" best" if i == best else "")
        lines.append(f"{THRESHOLDS[i]:10.2f}  {100 * miou[i]:6.2f}  {100 * of_all[i]:6.2f}  {bar}".rstrip())
    by_acr = f"mIoU {100 * of_all[best]:6.2f} over all {ids} with background, 0 for absent ones (ACR's way)"
    return "\n".join([*lines, summary_line(scores, title(row)), f"{by_acr} | {title(row)}"])


def _thresholded(plan: Plan, method: str, by_name: bool) -> Plan:
    """The plan of the kinds that a threshold decides. by_name: the kinds were asked for. Raises UserError."""
    found = {kind: of for kind, of in plan.kinds.items() if not of.background}
    if not found or (by_name and len(found) < len(plan.kinds)):
        other = next(kind for kind in plan.kinds if kind not in found)
        known = ", ".join(kind for kind, of in kinds_of(method).items() if not of.background) or "none"
        raise UserError(f"map {other} has a background of its own; kinds of {method} with a threshold: {known}")
    if plan.crf:
        raise UserError("evaluate.crf: the dense CRF knows no background threshold; give evaluate.crf=false")
    return plan._replace(kinds=found)
