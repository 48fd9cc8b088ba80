"""Writes the pseudo masks of a whole split for a second stage: PNGs with 255 where unsure, or irn's dictionaries.

    python tools/export_masks.py checkpoint=PATH output=FOLDER [format=png] [key=value ...]
    python engine/launch.py tools/export_masks.py 0,1 2 auto checkpoint=PATH output=FOLDER format=npy data.root=VOC

    format=png        NAME.png, palette: a class where its map is above `high`, 0 where all are below `low`, else 255;
                      evaluate.crf=true: either threshold's labels go through the dense CRF first
    format=irn-label  the same as irn's cam_to_ir_label makes them: high 0.3, low 0.05, its dense CRF
    format=npy        NAME.npy, as irn's make_cam writes them: keys, cam, high_res

Only the classes of the image labels count; no mask is needed. Where there are masks, the mIoU of the files is printed.
A second run goes on where the first one stopped.
"""

import argparse
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from omegaconf import DictConfig, OmegaConf

from engine.launch import run_script
from datasets import EvalItem, ImageSet, build_image_set
from engine.checkpoints.opening import find_checkpoint, open_checkpoint
from engine.distributed import Ranks, all_reduce_sum, barrier, cleanup, main_first, setup
from engine.evaluation.evaluate import check_classes
from engine.evaluation.results import summary_line, title
from engine.inference.images import claim_folder, is_finished, made_with, write_predictions
from engine.inference.predict import Plan, Prediction, evaluation_plan
from engine.inference.pseudo_masks import check_thresholds, confident_ids, irn_ids, save_irn
from utils.errors import UserError
from utils.images import IGNORE, read_label_map, to_uint8, write_label_png
from utils.metrics import Scores, confusion_matrix

FORMATS = ("png", "npy", "irn-label")
IRN_HIGH, IRN_LOW = 0.30, 0.05   # [irn] conf_fg_thres, conf_bg_thres
IRN_CRF = {"iterations": 10, "pos_xy_std": 3, "pos_w": 3, "bi_xy_std": 50, "bi_rgb_std": 5, "bi_w": 10}   # [irn]
OWN = ("checkpoint", "output", "format", "map", "split", "high", "low", "config")


class Rule:
    """How maps become a file: `format`, and for PNGs the thresholds and the CRF."""

    def __init__(self, options: argparse.Namespace, config: DictConfig) -> None:
        self.format, self.kind, self.bkg = options.format, options.map, config.evaluate.bkg
        self.ending = "npy" if self.format == "npy" else "png"
        if self.format == "npy" and (config.evaluate.crf or options.high is not None or options.low is not None):
            raise UserError("format=npy holds the maps themselves: high, low and evaluate.crf have no part in it")
        irn, labels = self.format == "irn-label", config.pseudo_labels
        high, low = (IRN_HIGH, IRN_LOW) if irn else (labels.high, labels.low)
        self.high = high if options.high is None else options.high
        self.low = low if options.low is None else options.low
        check_thresholds(self.high, self.low)
        own_crf = OmegaConf.to_container(config.crf) if config.evaluate.crf else None
        self.crf = {"backend": config.crf.backend, **IRN_CRF} if irn else own_crf

    def write(self, path: Path, item: EvalItem, prediction: Prediction) -> None:
        maps, present = prediction.maps[self.kind], prediction.present
        if self.format == "npy":
            save_irn(path, maps, present)
        else:
            ids = confident_ids(maps, present, to_uint8(item.image), self.high, self.low, self.crf)
            write_label_png(path, ids)

    def read(self, path: Path, num_ids: int) -> np.ndarray:
        """The ids of a written file; those of a dictionary at evaluate.bkg."""
        return irn_ids(path, self.bkg) if self.format == "npy" else read_label_map(path, num_ids)


def score_files(dataset: ImageSet, rule: Rule, path_of: Callable, ranks: Ranks) -> tuple[np.ndarray, int, int]:
    """Of all images with a mask: the confusion matrix without the pixels written as 255, their number, the images'."""
    count = len(dataset.classes) + 1
    matrix, left_out, images = np.zeros((count, count), np.int64), 0, 0
    for sample in dataset.samples[ranks.rank :: ranks.world]:
        if sample.mask is not None:
            truth, ids = read_label_map(sample.mask, count), rule.read(path_of(sample.name), count)
            unsure = (ids == IGNORE) & (truth != IGNORE)
            matrix += confusion_matrix(np.where(unsure, IGNORE, truth), np.where(ids == IGNORE, 0, ids), count)
            left_out, images = left_out + int(unsure.sum()), images + 1
    counts = torch.tensor([*matrix.ravel(), left_out, images], dtype=torch.int64, device=ranks.device)
    *cells, left_out, images = all_reduce_sum(counts).tolist()
    return np.array(cells).reshape(count, count), left_out, images


def summary(rule: Rule, plan: Plan, config: DictConfig, split: str, scored: tuple[np.ndarray, int, int]) -> str:
    """The line of the mIoU, which says what it is of."""
    matrix, left_out, images = scored
    made = plan.maps[rule.kind]
    row = {
        "map": rule.kind, "dataset": config.data.name, "split": split, "images": images, "scales": made.scales,
        "flip": made.flip, "crf": rule.crf is not None, "image_labels": "predicted" if plan.predicted else "given",
        "predicted_from": plan.predicted, "background": rule.bkg if rule.format == "npy" else None,
        "input": plan.base_size,
    }
    share = 100 * left_out / max(1, left_out + matrix.sum())
    unsure = f", high {rule.high:g}, low {rule.low:g}, {share:.2f} % of the pixels unsure and left out"
    return summary_line(Scores(matrix), title(row) + ("" if rule.format == "npy" else unsure))


def main(argv: list[str]) -> None:
    options = _parser().parse_intermixed_args(
        [f"--{item}" if item.partition("=")[0] in OWN and "=" in item else item for item in argv]
    )
    ranks = setup()
    with main_first():
        file = find_checkpoint(options.checkpoint)
    opened = open_checkpoint(file, [f"evaluate.maps=[{options.map}]", *options.settings], options.config)
    config, split = opened.config, options.split or opened.config.data.train_split
    plan, rule = evaluation_plan(config)._replace(kinds=(options.map,), crf=None), Rule(options, config)
    dataset = build_image_set(config, split)
    check_classes(file, dataset.classes)
    if any(sample.mask and sample.mask.parent.resolve() == options.output.resolve() for sample in dataset.samples):
        raise UserError(f"{options.output}: holds the masks of the data set; give another folder")
    settings = {**made_with(file, plan, config), **vars(rule), "split": split, "images": dataset.identity()}
    claim_folder(options.output, settings, options.overwrite, ranks)
    is_done = is_finished(options.output)

    def path_of(name: str) -> Path:
        return options.output / f"{name}.{rule.ending}"

    done = write_predictions(
        opened.method.to(ranks.device), dataset, plan, ranks, config,
        lambda item, prediction: rule.write(path_of(item.name), item, prediction),
        lambda name: is_done(path_of(name)), "export",
    )
    barrier()
    scored = score_files(dataset, rule, path_of, ranks)
    if ranks.rank == 0:
        print(f"{options.output}: {len(dataset)} files; {done.written} written by this process, {done.seconds:.1f} s")
        print(summary(rule, plan, config, split, scored) if scored[2] else "no masks there: mIoU not measured")
    cleanup()


def _parser() -> argparse.ArgumentParser:
    form = argparse.RawDescriptionHelpFormatter
    usage = "export_masks.py checkpoint=PATH output=FOLDER [format=png] [option=value ...] [key=value ...]"
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=form, usage=usage)
    parser.add_argument("--checkpoint", required=True, help="weights of a run, a folder as released, a .pth")
    parser.add_argument("--output", type=Path, required=True, help="folder of the files")
    parser.add_argument("--format", choices=FORMATS, default="png")
    parser.add_argument("--map", choices=("cam", "lam"), default="lam", help="default: lam")
    parser.add_argument("--split", help="default: data.train_split")
    parser.add_argument("--high", type=float, help="a class counts above it; default: pseudo_labels.high")
    parser.add_argument("--low", type=float, help="background is below it; default: pseudo_labels.low")
    parser.add_argument("--config", help="a config's name or file; default: the checkpoint's own")
    parser.add_argument("--overwrite", action="store_true", help="write again what is there already")
    parser.add_argument("settings", nargs="*", metavar="key=value", help="change the config of the checkpoint")
    return parser


if __name__ == "__main__":
    run_script(main)
