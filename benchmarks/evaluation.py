"""The benchmark of evaluation: all maps of an image, whose kinds share their forwards. Started by benchmark.py."""

import argparse
import statistics
import sys
import time
from functools import partial
from pathlib import Path

import numpy as np
import torch
from torch.utils.flop_counter import FlopCounterMode

from benchmarks.baselines.plain_maps import PlainMaps
from benchmarks.measure import CLASSES, batch_of, interleaved, load_images, median_ratio, seconds_of
from datasets import build_val_set, find_images, voc
from engine.checkpoints.files import save_weights
from engine.config import load_config, portable
from engine.distributed import Ranks
from engine.evaluation import evaluate as evaluations
from engine.inference.batch import Prediction, predict_batch
from engine.inference.image_files import predict_files
from engine.inference.plan import Plan, evaluation_plan
from engine.inference.prediction_folder import Predictor
from model.more.method import MoRe
from utils.batch import Batch

ALLOWED_DIFFERENCE = 1e-4   # share of pixels with another label: two orders of float32 sums
SIZE = 375, 500             # of the images, which most of VOC's have
WAYS = {                    # whose images a second are measured, with flip
    "seg": ("seg", "evaluate.scales.seg=[1.0]"),
    "lam": ("lam", "evaluate.multi_scale=true"),
    "lam_crf": ("lam", "evaluate.multi_scale=true", "evaluate.crf=true"),
}


def evaluate(options: argparse.Namespace) -> list[dict]:
    """Seconds an image of ours against the plain formulation; prints a table, returns its rows."""
    rows = []
    for batch in options.batch or (1,):
        row = {"benchmark": "evaluate", "batch": batch, "crop": options.crop, "backbone": options.backbone}
        row |= {"device": options.device}
        if options.device == "cuda" and not torch.cuda.is_available():
            row["measured"] = False
        else:
            row |= measure_maps(options, batch)
        rows.append(row)
        print_row(row)
        if row.get("difference", 0) > ALLOWED_DIFFERENCE:
            sys.exit(f"evaluate: {row['difference']:.1e} of the labels of ours and the plain maps differ")
    return rows


def measure_maps(options: argparse.Namespace, batch: int) -> dict:
    """The measured part of a row: seconds an image, operations, and the share of pixels with another label."""
    if options.device == "cpu":
        torch.set_num_threads(max(options.threads))
    backbone = [f"model.backbone={options.backbone}", "model.weights=random"]
    config = load_config("more_voc", [*backbone, "evaluate.multi_scale=true", f"evaluate.base_size={options.crop}"])
    torch.manual_seed(0)
    ours = MoRe(config, CLASSES).eval().to(options.device)
    plain = PlainMaps(config, CLASSES).eval().to(options.device)
    plain.load_state_dict(ours.state_dict())
    given, plan = batch_of(load_images(options.images, batch, *SIZE), options.device), evaluation_plan(config)
    calls = {"plain": partial(predictions, plain, given, plan), "ours": partial(predictions, ours, given, plan)}
    found, flops = {}, {}
    for name, call in calls.items():   # warms up
        with FlopCounterMode(display=False) as counter:
            found[name] = call()
        flops[name] = counter.get_total_flops() / batch
    repeats = options.repeats or 3
    times = interleaved({name: partial(seconds_of, call, options.device) for name, call in calls.items()}, repeats)
    seconds = {name: statistics.median(spent) / batch for name, spent in times.items()}
    ratio = median_ratio(times["plain"], times["ours"])
    measured = {"repeats": repeats, "seconds": seconds, "ratio": ratio, "flops": flops}
    return {**measured, "difference": difference(**found)}


def predictions(method: MoRe, given: Batch, plan: Plan) -> list[Prediction]:
    return predict_batch(method, given.images, given.labels, plan, given.names)


def difference(plain: list[Prediction], ours: list[Prediction]) -> float:
    """The share of pixels, of all label maps, with another label."""
    pairs = zip(plain, ours, strict=True)
    return float(np.mean([a.labels[row] != b.labels[row] for a, b in pairs for row in a.labels]))


def rates(root: Path, settings: list[str], ranks: Ranks) -> dict[str, dict[str, float]]:
    """Images a second of every one of WAYS, of an evaluation and of a prediction that writes all its files.

    root: of images and masks in the VOC layout, where the predictions go, too. settings: of the model, which is random.
    """
    config = load_config("more_voc", ["model.weights=random", *settings])
    torch.manual_seed(0)
    meta = {"method": "more", "classes": list(voc.CLASSES), "settings": portable(config)}
    save_weights(root / "random.safetensors", MoRe(config, CLASSES), meta)
    found = {}
    for way, (kind, *plan) in WAYS.items():
        given = [f"data.root={root}", "data.image_labels=masks", *plan]
        predictor = Predictor(ranks, str(root / "random.safetensors"), given, kinds=[kind])
        images = build_val_set(predictor.config)
        for turn in range(2):   # the first warms up
            begin = time.perf_counter()
            evaluations.evaluate(predictor.method, images, predictor.config, ranks, predictor.file)
            spent, folder = time.perf_counter() - begin, root / f"{way}{turn}"
            done = predict_files(predictor, find_images([str(root / "JPEGImages")], folder), folder, "cat,dog")
        found[way] = {"evaluation": len(images) / spent, "prediction": done.written / done.seconds}
        print(f"{way}: {found[way]}", flush=True)
    return found


def print_row(row: dict) -> None:
    print(f"\nevaluate: {row['backbone']}, batch {row['batch']}, squares of {row['crop']}, {row['device']}")
    if not row.get("measured", True):
        print("  not measured: no GPU")
        return
    seconds, flops = row["seconds"], {name: count / 1e9 for name, count in row["flops"].items()}
    print(f"  an image: plain {seconds['plain']:.3f} s, ours {seconds['ours']:.3f} s, medians of {row['repeats']}: "
          f"{row['ratio']:.2f} times as fast; {row['difference']:.1e} of the labels differ")
    print(f"  plain {flops['plain']:.0f} GFLOP, ours {flops['ours']:.0f}: {flops['plain'] / flops['ours']:.2f} times "
          "as many", flush=True)
