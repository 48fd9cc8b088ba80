"""Measures ours against others: a table for people, JSON for programs.

    python benchmarks/benchmark.py bilateral crf
    python benchmarks/benchmark.py step parts --batch 4 --crop 448 --images VOC/JPEGImages
    python benchmarks/benchmark.py crf --sizes 375x500x21 --threads 1,2,4 --images VOC/JPEGImages --json crf.json

    bilateral   bilateral_filter against the plain one-thread C++ of baselines/plain_filter.cpp, for random maps;
                difference: the largest, relative to the largest value
    crf         DenseCRF against pydensecrf, with the default parameters of `crf`, for smooth random maps;
                difference: share of pixels with another label
    step        the real trainer's step in its last stage against plain_step.py, plain_afa.py or plain_acr.py of
                baselines/: the whole, its phases, operators, utilisation, peak memory (--no-baseline: ours alone)
    parts       PAR refinement and the two losses of LIR, or AFA's random walk and affinity loss, with their gradients,
                or ACR's GETAM, consistency and sweep of thresholds, against the same baselines
    evaluate    seconds an image of all maps of an evaluation at seven scales with flip, whose kinds share their
                forward passes, against baselines/plain_maps.py; difference: share of pixels with another label
    data        images a second of the training data set, with each of --threads workers
    ddp         a step of two processes with one CPU thread each against one process with one thread

Sizes are HEIGHTxWIDTHxCHANNELS. Times are of a whole batch. In every repeat the baseline and ours, at each number of
threads, take turns: the table shows the median of every time, and the median of the repeats' ratios, baseline to ours.
The baselines run on the CPU also with --device cuda. Results that differ by more than they may end the benchmark with
exit code 1.
"""

import argparse
import json
import os
from collections.abc import Callable
from pathlib import Path

import torch

from engine.launch import run_script
from benchmarks import evaluation, filter_and_crf, training
from bilateralfilter import _extension

# each prints its table and returns its rows
BENCHMARKS: dict[str, Callable[[argparse.Namespace], list[dict]]] = {
    "bilateral": filter_and_crf.bilateral,
    "crf": filter_and_crf.crf,
    "step": training.step,
    "parts": training.parts,
    "evaluate": evaluation.evaluate,
    "data": training.data,
    "ddp": training.ddp,
}


def machine(device: str) -> dict:
    """What the numbers depend on."""
    return {
        "torch": torch.__version__,
        "cores": len(os.sched_getaffinity(0)),
        "vectors": torch.backends.cpu.get_cpu_capability(),
        "gpu": torch.cuda.get_device_name() if device == "cuda" and torch.cuda.is_available() else None,
        "compiled": _extension.load(device) if device == "cpu" or torch.cuda.is_available() else None,
    }


def number(text: str) -> int:
    """A positive integer. Raises ValueError for all else, as argparse wants it."""
    if int(text) < 1:
        raise ValueError(text)
    return int(text)


def numbers(text: str) -> list[int]:
    return [number(part) for part in text.split(",")]


def sizes(text: str) -> list[tuple[int, int, int]]:
    parts = [tuple(map(number, part.split("x"))) for part in text.split(",")]
    if any(len(part) != 3 for part in parts):
        raise ValueError(text)
    return parts


def precisions(text: str) -> list[str]:
    parts = text.split(",")
    if not set(parts) <= {"fp32", "bf16"}:
        raise ValueError(text)
    return parts


def main(argv: list[str]) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("benchmarks", nargs="+", choices=BENCHMARKS, metavar="|".join(BENCHMARKS))
    parser.add_argument("--sizes", type=sizes, default="224x224x21,224x224x81,375x500x21,375x500x81")
    parser.add_argument("--batch", type=numbers,
                        help="default 1,4,8 (crf: without the largest); step, parts: 4; ddp, evaluate: 1")
    parser.add_argument("--threads", type=numbers, default="1,2")
    parser.add_argument("--repeats", type=number, help="default: what fits into a few seconds a case")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--images", type=Path, help="folder of images, resized to the size; default: generated shapes")
    parser.add_argument("--method", choices=training.DEFAULTS, default="more", help="of step, parts and ddp")
    parser.add_argument("--crop", type=number, help="of the crops; evaluate: of the squares; 448, afa: 512, acr: 384")
    parser.add_argument("--backbone", help="default vit_base_patch16_224, afa: mit_b1, acr: vit_base_r50_s16_384")
    parser.add_argument("--precision", type=precisions, default="fp32", help="step: fp32, bf16 or fp32,bf16")
    parser.add_argument("--no-baseline", dest="baseline", action="store_false", help="step: ours alone")
    parser.add_argument("--json", type=Path, help="file to write")
    options = parser.parse_args(argv)
    backbone, crop = training.DEFAULTS[options.method]
    options.backbone, options.crop = options.backbone or backbone, options.crop or crop
    if options.json:
        options.json.parent.mkdir(parents=True, exist_ok=True)
    about = machine(options.device)
    print(", ".join(f"{key}: {value}" for key, value in about.items()))
    rows = [row for name in options.benchmarks for row in BENCHMARKS[name](options)]
    if options.json:
        options.json.write_text(json.dumps({"machine": about, "rows": rows}, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    run_script(main)
