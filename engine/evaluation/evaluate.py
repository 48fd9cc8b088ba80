"""Scores the maps of a method on labelled images: one path for the validation in training and for the tools."""

import time
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from omegaconf import DictConfig
from torch import nn
from torch.utils.data import DataLoader, Dataset, Subset
from tqdm import tqdm

from datasets import EvalItem
from engine.checkpoints import files as checkpoint
from engine.distributed import Ranks, all_reduce_sum, barrier, gather, loader_workers, use_tf32
from engine.evaluation.image_scores import ImageScores, new_evaluation, write_evaluation
from engine.evaluation.results import append_results, score_entries, summary_line, table, title
from engine.inference.images import as_is, over_images
from engine.inference.pictures import prediction_panels, save_picture, side_by_side
from engine.inference.predict import Plan, Prediction, Row, evaluation_plan, row_name, validation_plan
from utils.errors import UserError
from utils.images import write_label_png
from utils.metrics import Scores, confusion_matrix


def validate(method: nn.Module, dataset: Dataset, config: DictConfig, ranks: Ranks) -> dict[str, float]:
    """mIoU (0..1) of `cam`, `lam`, `fused`, `seg` by the plan of training, the same on all ranks.

    dataset: with `classes`; its first train.validate_images images are used.
    """
    images, classes = _first(dataset, config.train.validate_images), len(dataset.classes)
    workers = loader_workers(config, ranks)
    matrices = score(method, images, classes, validation_plan(config), ranks, workers, config.evaluate.images_at_once)
    return {kind: Scores(matrix).miou for (kind, _), matrix in matrices.items()}


def evaluate(
    method: nn.Module, dataset: Dataset, config: DictConfig, ranks: Ranks, weights: str, results: Path | None = None
) -> list[dict]:
    """Evaluates as config.evaluate says; the first rank prints and appends the rows to the file `results`.

    dataset: of the split config.data.val_split, with `classes`. weights: the checkpoint's path, for the rows.
    Returns one row a label map: `map, dataset, split, images, scales, flip, crf, image_labels, predicted_from,
    background, input, miou, pixel_accuracy, iou, checkpoint, iteration, seconds, evaluation`. Scores are shares in
    0..1; image_labels is None for the segmentation, which uses none; background: the threshold, where there is one;
    input: side of the squares, None for native size; iteration: the checkpoint's, None where its file does not say;
    seconds are those of the whole pass, which makes all rows; evaluation: the folder, in evaluation/ beside `results`,
    with its confusion matrices and the scores of its images.
    """
    plan, started = evaluation_plan(config), time.perf_counter()
    images, classes = _first(dataset, config.evaluate.images), len(dataset.classes)
    folders = config.evaluate.save_labels, config.evaluate.save_overlays
    use_tf32(config.train.tf32)
    workers = loader_workers(config, ranks)
    each = ImageScores(plan.rows, config.evaluate.report_images)
    evaluation = gather(None if results is None or ranks.rank else new_evaluation(results.parent))[0]
    iteration = checkpoint.read_meta(weights).get("iteration") if Path(weights).is_file() else None
    matrices = score(method, images, classes, plan, ranks, workers, config.evaluate.images_at_once, *folders, each)
    each.gather()
    facts = {"dataset": config.data.name, "split": config.data.val_split, "images": len(images)}
    seconds, names = round(time.perf_counter() - started, 1), ("background", *dataset.classes)
    rows, tables, summary = [], [], []
    for row, matrix in matrices.items():
        scores = Scores(matrix)
        made_of = {"checkpoint": weights, "iteration": iteration, "seconds": seconds, "evaluation": evaluation}
        entry = {**_settings(row, plan, facts), **score_entries(scores, names), **made_of}
        heading = title(entry)
        rows.append(entry)
        tables.append(table(scores, names, heading))
        summary.append(summary_line(scores, heading))
    if ranks.rank == 0:
        print("\n" + "\n\n".join([*tables, "\n".join(["Summary", *summary])]), flush=True)
        if results is not None:
            append_results(results, rows)
            print(f"results: {results}", flush=True)
            write_evaluation(results.parent, evaluation, matrices, dataset.classes, each)
    barrier()
    return rows


def score(
    method: nn.Module, dataset: Dataset, num_classes: int, plan: Plan, ranks: Ranks, workers: int = 0,
    batch_size: int | None = None, save_labels: str | None = None, save_overlays: str | None = None,
    image_scores: ImageScores | None = None,
) -> dict[Row, np.ndarray]:
    """The confusion matrix (K+1, K+1) of every row of the plan over a whole data set, the same on all ranks.

    Rank r takes the images r, r + world, ...; integer counts are summed, so the number of processes changes nothing.
    On a CPU each image is computed by one thread, as many images at once as there are threads: sums in another order
    round otherwise, so that scores would depend on the number of threads. batch_size: how many images of one size go
    through the method together; None: 1 on a CPU, for the same reason, 8 on a GPU. While the device computes one batch,
    another thread decides labels, runs the CRF and draws.
    save_labels, save_overlays: folders of the label PNGs (FOLDER/MAP/NAME.png) and the pictures (FOLDER/NAME.png).
    image_scores: gets every image of this process.
    """
    matrices = {row: np.zeros((num_classes + 1, num_classes + 1), np.int64) for row in plan.rows}
    share = Subset(dataset, range(ranks.rank, len(dataset), ranks.world))
    # a generator of its own: the loader must not draw from the one that training goes on with
    loader = DataLoader(share, batch_size=None, collate_fn=as_is, num_workers=workers, generator=torch.Generator())
    # closed on the way out, so that a message of an error starts on a line of its own
    bar = tqdm(desc="evaluate", total=len(share), disable=ranks.rank != 0, dynamic_ncols=True)
    with bar, over_images(method, loader, plan, ranks.device, _both, batch_size) as predictions:
        for item, prediction in predictions:
            counts = {}
            for row, labels in prediction.labels.items():
                counts[row] = confusion_matrix(item.label_map, labels, num_classes + 1)
                matrices[row] += counts[row]
                if save_labels:
                    write_label_png(Path(save_labels) / row_name(row) / f"{item.name}.png", labels)
            if save_overlays:
                picture = side_by_side(prediction_panels(item, prediction))
                save_picture(Path(save_overlays) / f"{item.name}.png", picture)
            if image_scores is not None:
                image_scores.add(item, prediction, counts)
            bar.update()
    total = all_reduce_sum(torch.from_numpy(np.stack(list(matrices.values()))).to(ranks.device)).cpu().numpy()
    return dict(zip(matrices, total, strict=True))


def check_classes(path: str, classes: Sequence[str]) -> None:
    """Raises UserError where the checkpoint was made for other classes than the data's, or for another order of them.

    They come from the weights file's own note; of a released file the number alone, from its classifier's shape.
    """
    own = checkpoint.read_meta(path).get("classes")
    count = checkpoint.classifier_rows(path) if own is None else len(own)
    if count not in (None, len(classes)):
        raise UserError(
            f"{path} has {count} classes, the data has {len(classes)}: give its own data (data.name, data.classes)"
        )
    for index, (theirs, ours) in enumerate(zip(own or classes, classes, strict=True), start=1):
        if theirs != ours:
            raise UserError(f"{path}: class {index} is '{theirs}', in the data '{ours}': give its own data.classes")


def run_folder(path: str) -> Path:
    """The folder of the run a checkpoint belongs to: the parent of checkpoints/, else the checkpoint's own folder."""
    folder = Path(path).parent
    return folder.parent if folder.name == "checkpoints" else folder


def _settings(row: Row, plan: Plan, facts: dict) -> dict:
    """The entries of a result's row that say what it is of."""
    kind, crf = row
    labels = None if kind == "seg" else "predicted" if plan.predicted else "given"
    how = {"scales": list(plan.maps[kind].scales), "flip": plan.maps[kind].flip, "crf": crf, "image_labels": labels}
    more = {
        "predicted_from": plan.predicted if labels == "predicted" else None,
        "background": None if kind == "seg" or crf else plan.maps[kind].bkg,
        "input": plan.base_size,
    }
    return {"map": kind, **facts, **how, **more}


def _both(item: EvalItem, prediction: Prediction) -> tuple[EvalItem, Prediction]:
    return item, prediction


def _first(dataset: Dataset, count: int | None) -> Dataset:
    return dataset if count is None or count >= len(dataset) else Subset(dataset, range(count))
