"""Scores a checkpoint on the labelled images of its config."""

from collections.abc import Callable, Sequence
from pathlib import Path

from datasets import build_val_set
from engine.alike import check_same, check_same_file
from engine.checkpoints.files import check_classes, load_weights, run_folder
from engine.checkpoints.opening import SUMS, checkpoint_config, find_checkpoint
from engine.config import RunConfig
from engine.distributed import Ranks, main_first
from engine.evaluation.evaluate import evaluate
from engine.inference.plan import maps_setting
from model import build_method


def evaluate_checkpoint(
    ranks: Ranks, checkpoint: str, settings: Sequence[str] = (), config: str | None = None,
    fallback: str | None = None, kind: Callable[[RunConfig], str] | None = None,
) -> list[dict]:
    """The rows of `evaluate`, which are appended to the results.json of the checkpoint's run.

    checkpoint, settings, config: as `open_checkpoint` takes them. fallback: name of the config where the checkpoint has
    none. kind: gives the one kind of map that is scored where the settings name none in evaluate.maps.
    Raises UserError, also for other classes than the data's.
    """
    with main_first():
        file = find_checkpoint(checkpoint)
    how = config, fallback
    if kind is not None:
        settings = [maps_setting([kind(checkpoint_config(file, settings, *how)[0])]), *settings]
    resolved, name = checkpoint_config(file, settings, *how)
    dataset = build_val_set(resolved)
    check_same(dataset.facts())
    check_same_file(file)
    check_classes(file, dataset.classes)
    method = build_method(resolved, len(dataset.classes))
    load_weights(file, method)
    if ranks.rank == 0:
        print(f"checkpoint {file}, config {name}", flush=True)
    results = results_folder(checkpoint, file) / "results.json"
    return evaluate(method.to(ranks.device), dataset, resolved, ranks, file, results)


def results_folder(checkpoint: str, file: str) -> Path:
    """The run of the weights; this folder where they are a release, or were given by a name and lie among downloads."""
    folder = run_folder(file)
    return folder if Path(checkpoint).exists() and not (folder / SUMS).is_file() else Path()
