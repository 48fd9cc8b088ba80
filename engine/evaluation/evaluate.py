"""Scores the maps of a method on labelled images: one path for the validation in training and for the tools."""

import time
from pathlib import Path

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset, Subset

from datasets import EvalItem
from engine.alike import check_all_there
from engine.checkpoints import files
from engine.config import RunConfig
from engine.distributed import Ranks, all_reduce_sum, barrier, gather, loader_workers, use_tf32
from engine.evaluation.image_scores import ImageScores, new_evaluation, write_evaluation
from engine.evaluation.results import (
    append_results,
    facts_of,
    score_entries,
    scores_of,
    settings_of,
    summary_line,
    table,
    title,
)
from engine.inference.batch import Prediction, on_host
from engine.inference.many import as_is, labels_alone, over_images
from engine.inference.pictures import prediction_panels, save_picture, side_by_side
from engine.inference.plan import Plan, Row, evaluation_plan, row_name, validation_plan
from model.method import Method
from utils.images import write_label_png
from utils.metrics import Scores, confusion_matrix
from utils.progress import enter, progress_bar


def validate(method: Method, dataset: Dataset, config: RunConfig, ranks: Ranks) -> tuple[dict[str, float], int]:
    """mIoU (0..1) of every kind of map by the plan of training, and the number of classes present, on all ranks.

    dataset: with `classes`; its first train.validate_images images are used. Raises UserError where they show no class.
    """
    images, classes = first_images(dataset, config.train.validate_images), len(dataset.classes)
    workers = loader_workers(config, ranks)
    matrices = score(method, images, classes, validation_plan(config), ranks, workers, config.evaluate.images_at_once)
    scores = {kind: scores_of(matrix, config.data.val_split) for (kind, _), matrix in matrices.items()}
    present = max(int(of_kind.present.sum()) for of_kind in scores.values())
    return {kind: of_kind.miou for kind, of_kind in scores.items()}, present


def evaluate(
    method: Method, dataset: Dataset, config: RunConfig, ranks: Ranks, weights: str, results: Path | None = None
) -> list[dict]:
    """Evaluates as config.evaluate says; the first rank prints and appends the rows to the file `results`.

    dataset: of the split config.data.val_split, with `classes`. weights: the checkpoint's path, for the rows.
    Returns one row for each label map: `map, method, dataset, split, images, scales, flip, crf, image_labels,
    predicted_from, background, input, precision, miou, pixel_accuracy, iou, checkpoint, iteration, seconds,
    evaluation`. Scores are shares in 0..1; image_labels is None for a kind that uses none; background: the threshold,
    where there is one; input: side of the squares, None for native size; precision: fp32 or bf16; iteration: the
    checkpoint's, None where its file does not say; seconds are those of the whole pass, which makes all rows;
    evaluation: the folder, in evaluation/ beside `results`, with its confusion matrices and the scores of its images.
    Where they are set also long_side, background_power of maps without background after the CRF, and `settings`, the
    method's keys that the map is made with and that are not at their defaults.
    """
    plan, started = evaluation_plan(config).on(ranks.device), time.perf_counter()
    iteration = files.read_meta(weights).get("iteration") if Path(weights).is_file() else None   # of what was loaded
    images, classes = first_images(dataset, config.evaluate.images), len(dataset.classes)
    folders = config.evaluate.save_labels, config.evaluate.save_overlays
    use_tf32(config.train.tf32)
    workers = loader_workers(config, ranks)
    each = ImageScores(plan, method.best_by, config.evaluate.report_images)
    evaluation = gather(None if results is None or ranks.rank else new_evaluation(results.parent))[0]
    matrices = score(method, images, classes, plan, ranks, workers, config.evaluate.images_at_once, *folders, each)
    each.gather()
    for folder, inside in zip(folders, (row_name(plan.rows[0]), ""), strict=True):
        if folder:
            lacking = [name for name, _ in each.scores if not Path(folder, inside, f"{name}.png").is_file()]
            check_all_there(lacking, len(each.scores), folder)
    made_of = {"checkpoint": weights, "iteration": iteration}
    made_of |= {"seconds": round(time.perf_counter() - started, 1), "evaluation": evaluation}
    facts, names = facts_of(config, config.data.val_split, len(images)), ("background", *dataset.classes)
    scores = {row: scores_of(matrix, config.data.val_split) for row, matrix in matrices.items()}
    rows = [
        {**settings_of(row, plan, facts), **score_entries(of_row, names), **made_of} for row, of_row in scores.items()
    ]
    if ranks.rank == 0:
        _print(list(scores.values()), rows, names)
        if results is not None:
            append_results(results, rows)
            print(f"results: {results}", flush=True)
            write_evaluation(results.parent, evaluation, matrices, dataset.classes, each)
    barrier()
    return rows


def _print(scores: list[Scores], rows: list[dict], names: tuple[str, ...]) -> None:
    """A table for each row, and all their summaries."""
    pairs = [(of_row, title(row)) for of_row, row in zip(scores, rows, strict=True)]
    tables = [table(of_row, names, heading) for of_row, heading in pairs]
    summary = [summary_line(of_row, heading) for of_row, heading in pairs]
    print("\n" + "\n\n".join([*tables, "\n".join(["Summary", *summary])]), flush=True)


def score(
    method: Method, dataset: Dataset, num_classes: int, plan: Plan, ranks: Ranks, workers: int = 0,
    batch_size: int | None = None, save_labels: str | None = None, save_overlays: str | None = None,
    image_scores: ImageScores | None = None,
) -> dict[Row, np.ndarray]:
    """The confusion matrix (K+1, K+1) of every row of the plan over a whole data set, the same on all ranks.

    Rank r takes the images r, r + world, ...; integer counts are summed, so the number of processes changes nothing.
    On a CPU each image is computed by one thread, as many images at once as there are threads: sums in another order
    round otherwise, so that scores would depend on the number of threads. batch_size: how many images of one size go
    through the method together; None: 1 on a CPU, for the same reason, 8 on a GPU, where other threads
    count, draw and write meanwhile.
    save_labels, save_overlays: folders of the label PNGs (FOLDER/MAP/NAME.png) and the pictures (FOLDER/NAME.png).
    image_scores: gets every image of this process.
    """
    matrices = {row: np.zeros((num_classes + 1, num_classes + 1), np.int64) for row in plan.rows}
    loader = share_loader(dataset, ranks, workers)
    # closed on the way out, so that a message of an error starts on a line of its own
    bar = progress_bar(desc="evaluate", total=len(loader), disable=ranks.rank != 0)
    pictures = save_overlays or image_scores is not None
    take = (lambda _, predictions: on_host(predictions, plan)) if pictures else labels_alone

    def counted(item: EvalItem, prediction: Prediction) -> tuple[EvalItem, Prediction, dict[Row, np.ndarray]]:
        counts = {}
        for row, labels in prediction.labels.items():
            counts[row] = confusion_matrix(item.label_map, labels, num_classes + 1)
            if save_labels:
                write_label_png(Path(save_labels) / row_name(row) / f"{item.name}.png", labels)
        if save_overlays:
            picture = side_by_side(prediction_panels(item, prediction, plan))
            save_picture(Path(save_overlays) / f"{item.name}.png", picture)
        return item, prediction, counts

    with bar, over_images(method, loader, plan, ranks.device, counted, batch_size, take=take) as results:
        for item, prediction, counts in results:
            for row, matrix in counts.items():
                matrices[row] += matrix
            if image_scores is not None:
                image_scores.add(item, prediction, counts)
            bar.update()
    enter("the sum of the scores")
    total = all_reduce_sum(torch.from_numpy(np.stack(list(matrices.values()))).to(ranks.device)).cpu().numpy()
    return dict(zip(matrices, total, strict=True))


def share_loader(dataset: Dataset, ranks: Ranks, workers: int) -> DataLoader:
    """A loader of the images r, r + world, ... of rank r."""
    share = Subset(dataset, range(ranks.rank, len(dataset), ranks.world))
    # a generator of its own: the loader must not draw from the one that training goes on with
    return DataLoader(share, batch_size=None, collate_fn=as_is, num_workers=workers, generator=torch.Generator())


def first_images(dataset: Dataset, count: int | None) -> Dataset:
    """All images where count is None."""
    return dataset if count is None or count >= len(dataset) else Subset(dataset, range(count))
