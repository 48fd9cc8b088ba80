"""Scores CAM, LAM and segmentation of a checkpoint: infer_voc.py checkpoint=PATH [config=NAME] [key=value ...].

Started by run_evaluate_voc.sh under torchrun. The config is the one named, else the config.yaml of the
checkpoint's run, else that in the weights file, else more_voc; key=value goes on top.
"""

from pathlib import Path

from engine.launch import run_script
from datasets import build_val_set
from engine.checkpoints.files import load_weights
from engine.checkpoints.opening import SUMS, checkpoint_config, find_checkpoint
from engine.distributed import cleanup, setup
from engine.evaluation.evaluate import check_classes, evaluate, run_folder
from model import build_method
from engine.config import split_config
from utils.errors import UserError


def main(argv: list[str], default: str = "more_voc", settings: tuple[str, ...] = ()) -> None:
    """default: the config where the checkpoint's run has none. settings: key=value pairs that argv may override."""
    weights, rest = split_checkpoint(argv)
    named, overrides = split_config(rest, None)
    config, name = checkpoint_config(weights, [*settings, *overrides], named, default)
    ranks = setup()
    dataset = build_val_set(config)
    check_classes(weights, dataset.classes)
    method = build_method(config, len(dataset.classes))
    load_weights(weights, method)
    if ranks.rank == 0:
        print(f"checkpoint {weights}, config {name}", flush=True)
    evaluate(method.to(ranks.device), dataset, config, ranks, weights, results_folder(argv, weights) / "results.json")
    cleanup()


def results_folder(argv: list[str], weights: str) -> Path:
    """The run of the weights; this folder where they are a release, or were given by a name and lie among downloads."""
    folder = run_folder(weights)
    return folder if Path(_checkpoints(argv)[-1]).exists() and not (folder / SUMS).is_file() else Path()


def split_checkpoint(argv: list[str]) -> tuple[str, list[str]]:
    """Takes checkpoint=PATH out of the arguments: the weights file it means (`find_checkpoint`), the other arguments.

    Raises UserError where it, or its file, is not there.
    """
    paths = _checkpoints(argv)
    if not paths or not paths[-1]:
        raise UserError("no checkpoint given: add checkpoint=PATH, a weights file of a run or an official one")
    return find_checkpoint(paths[-1]), [item for item in argv if not item.startswith("checkpoint=")]


def _checkpoints(argv: list[str]) -> list[str]:
    return [item.removeprefix("checkpoint=") for item in argv if item.startswith("checkpoint=")]


if __name__ == "__main__":
    run_script(main)
