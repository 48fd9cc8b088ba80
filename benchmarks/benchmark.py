"""Measures ours against others: a table for people, JSON for programs.

    python benchmarks/benchmark.py bilateral crf
    python benchmarks/benchmark.py step parts --batch 4 --crop 448 --images VOC/JPEGImages
    python benchmarks/benchmark.py crf --sizes 375x500x21 --threads 1,2,4 --images VOC/JPEGImages --json crf.json

    bilateral   bilateral_filter against the plain one-thread C++ of baselines/plain_filter.cpp, for random maps;
                difference: the largest, relative to the largest value
    crf         DenseCRF against pydensecrf, with the crf: parameters of configs/default.yaml, for smooth random maps;
                difference: share of pixels with another label
    step        the real trainer's step in its last stage against baselines/plain_step.py: the whole, its phases,
                operators, utilisation, peak memory (--no-baseline: ours alone)
    parts       PAR refinement and the two losses of LIR, with their gradients, against the same baseline
    data        images a second of the training data set, with each of --threads workers
    ddp         a step of two processes with one CPU thread each against one process with one thread

Sizes are HEIGHTxWIDTHxCHANNELS. Times are of a whole batch. In every repeat the baseline and ours, at each number of
threads, take turns: the table shows the median of every time, and the median of the repeats' ratios, baseline to ours.
The baselines run on the CPU also with --device cuda. Results that differ by more than they may end the benchmark with
exit code 1.
"""

import argparse
import dataclasses
import functools
import importlib
import json
import os
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path

import cv2
import numpy as np
import torch
import torch.nn.functional as F
from omegaconf import OmegaConf
from torch import Tensor

from engine.launch import run_script
from bilateralfilter import DenseCRF, _extension, bilateral_filter
from datasets import shapes
from engine.config import load_config
from utils.crf import dense_crf
from utils.errors import UserError
from utils.files import ROOT
from utils.images import read_rgb

SIGMA_RGB, SIGMA_XY = 15.0, 50.0
LEAST_REPEATS, MOST_REPEATS, SECONDS = 3, 9, 4  # without --repeats: as many as fit into so many seconds a case
CRF_VALUES = 17_000_000                         # without --batch, crf leaves out cases of more probabilities
BILATERAL_DIFFERENCE = {"cpu": 1e-5, "cuda": 1e-4}
CRF_DIFFERENCE = 1e-3
NOT_MEASURED = "not measured"


@dataclasses.dataclass
class Rivals:
    """Two ways to the same result on the same inputs."""

    ours: Callable[[], Tensor]                      # on the device that is measured
    baseline: Callable[[], Tensor] | None           # on the CPU; None where it is not installed
    difference: Callable[[Tensor, Tensor], float]   # between two results
    allowed: float                                  # difference


def bilateral_rivals(images: Tensor, channels: int, device: str) -> Rivals:
    maps = torch.randn(len(images), channels, *images.shape[2:]).softmax(1)
    on_cpu = (images.float(), maps)
    on_device = [x.to(device) for x in on_cpu]
    plain = load_plain_filter()
    return Rivals(
        ours=lambda: bilateral_filter(*on_device, SIGMA_RGB, SIGMA_XY),
        baseline=lambda: plain(*on_cpu, SIGMA_RGB, SIGMA_XY),
        difference=lambda a, b: float((a - b).abs().max() / b.abs().max()),
        allowed=BILATERAL_DIFFERENCE[device],
    )


@functools.cache
def load_plain_filter() -> Callable[[Tensor, Tensor, float, float], Tensor]:
    """torch.ops.plain_filter.filter(images, maps, sigma_rgb, sigma_xy), compiled into baselines/build on first use."""
    from torch.utils import cpp_extension

    folder = ROOT / "benchmarks" / "baselines"
    work = folder / "build" / f"torch{torch.__version__}"
    work.mkdir(parents=True, exist_ok=True)
    os.environ["PATH"] = f"{Path(sys.executable).parent}{os.pathsep}{os.environ.get('PATH', '')}"  # for ninja
    try:
        cpp_extension.load(
            "plain_filter", [str(folder / "plain_filter.cpp")], extra_cflags=["-O3"], build_directory=str(work),
            is_python_module=False,
        )
    except RuntimeError as error:
        raise UserError(f"baselines/plain_filter.cpp cannot be compiled: {str(error).splitlines()[0]}") from error
    return torch.ops.plain_filter.filter


def crf_rivals(images: Tensor, channels: int, device: str) -> Rivals:
    settings = OmegaConf.to_container(load_config().crf)
    parameters = {key: value for key, value in settings.items() if key != "backend"}
    height, width = images.shape[2:]
    coarse = torch.randn(len(images), channels, -(-height // 16) + 1, -(-width // 16) + 1)
    logits = F.interpolate(coarse, (height, width), mode="bicubic", align_corners=False)
    prob = (3 * logits).softmax(1)  # every class is above 1e-5 somewhere: ours leaves none out
    on_device = images.float().to(device), prob.to(device)
    crf = DenseCRF(**parameters)
    return Rivals(
        ours=lambda: crf(*on_device),
        baseline=pydensecrf_call(images, prob, parameters),
        difference=lambda a, b: float((a.argmax(1) != b.argmax(1)).double().mean()),
        allowed=CRF_DIFFERENCE,
    )


def pydensecrf_call(images: Tensor, prob: Tensor, parameters: dict) -> Callable[[], Tensor] | None:
    """The same inference through pydensecrf, one image after the other; None where it is not installed."""
    try:
        importlib.import_module("pydensecrf.densecrf")
    except ImportError:
        return None
    pairs = list(zip(images.permute(0, 2, 3, 1).numpy(), prob, strict=True))
    return lambda: torch.stack([dense_crf(*pair, backend="pydensecrf", **parameters) for pair in pairs])


def compare(
    name: str, baseline: str, prepare: Callable[[Tensor, int, str], Rivals], most: float, options: argparse.Namespace
) -> list[dict]:
    """Prints the table of one benchmark, a line as soon as it is measured; returns its rows.

    baseline: its name. most: cases of more values are left out unless --batch asks for them.
    """
    ours = [str(threads) for threads in options.threads] if options.device == "cpu" else ["cuda"]
    images = str(options.images or "generated shapes")
    on = {"cpu": f"{' and '.join(ours)} CPU threads", "cuda": "the GPU"}[options.device]
    print(f"\n{name}: ours on {on} against {baseline}; images: {images}")
    headings = ["size", "batch", "repeats", f"{baseline} ms", *(f"ours/{run} ms" for run in ours)]
    headings += [f"ratio/{run}" for run in ours] + [f"{run} over {ours[0]}" for run in ours[1:]] + ["difference"]
    widths = [max(len(heading), len(NOT_MEASURED)) for heading in headings]
    widths[1:3] = 5, 7
    print_line(headings, widths)
    available = options.device == "cpu" or torch.cuda.is_available()
    rows = []
    for height, width, channels in options.sizes:
        for batch in options.batch or (1, 4, 8):
            row = {"benchmark": name, "size": f"{height}x{width}x{channels}", "batch": batch, "images": images}
            row |= {"device": options.device, "baseline": baseline}
            if available and (options.batch or batch * height * width * channels <= most):
                torch.manual_seed(0)
                rivals = prepare(load_images(options.images, batch, height, width), channels, options.device)
                row |= measure(rivals, ours, options)
            rows.append(row)
            print_line(cells(row, ours), widths)
            if not row.get("agrees", True):
                sys.exit(f"{name}: ours and {baseline} differ by {row['difference']:.1e} > {rivals.allowed:.0e}")
    return rows


def measure(rivals: Rivals, ours: list[str], options: argparse.Namespace) -> dict:
    """The measured part of a row; `ours` are numbers of threads, or cuda.

    repeats; difference, the largest, and agrees, whether it is allowed; seconds {baseline or one of ours: median};
    ratio {one of ours: baseline's time over its}; scaling {one of ours: time of the first of ours over its}. The first
    round warms up and is not counted; its results are compared.
    """
    turns = {run: (rivals.ours, options.device, int(run) if run != "cuda" else 1) for run in ours}
    if rivals.baseline is not None:
        turns = {"baseline": (rivals.baseline, "cpu", 1)} | turns
    begin = time.perf_counter()
    results = {}
    for run, (call, _, threads) in turns.items():
        torch.set_num_threads(threads)
        results[run] = call().cpu()
    fitting = int(SECONDS / (time.perf_counter() - begin))
    row = {"repeats": options.repeats or min(max(fitting, LEAST_REPEATS), MOST_REPEATS)}
    if rivals.baseline is not None:
        differences = [rivals.difference(results[run], results["baseline"]) for run in ours]
        row |= {"difference": max(differences), "agrees": all(x <= rivals.allowed for x in differences)}
    del results
    times = {run: [] for run in turns}
    for _ in range(row["repeats"]):
        for run, (call, device, threads) in turns.items():
            torch.set_num_threads(threads)
            times[run].append(seconds_of(call, device))
    row["seconds"] = {run: statistics.median(times[run]) for run in times}
    row["ratio"] = {run: median_ratio(times["baseline"], times[run]) for run in ours if rivals.baseline is not None}
    row["scaling"] = {run: median_ratio(times[ours[0]], times[run]) for run in ours[1:]}
    return row


def seconds_of(call: Callable[[], Tensor], device: str) -> float:
    if device == "cpu":
        begin = time.perf_counter()
        call()
        return time.perf_counter() - begin
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    torch.cuda.synchronize()
    start.record()
    call()
    end.record()
    end.synchronize()
    return start.elapsed_time(end) / 1000


def median_ratio(of: list[float], to: list[float]) -> float:
    return statistics.median(a / b for a, b in zip(of, to, strict=True))


def load_images(folder: Path | None, batch: int, height: int, width: int) -> Tensor:
    """uint8 (batch, 3, height, width): the folder's images from the first on, over and over; without it shapes."""
    if folder is None:
        side = max(height, width, 32)
        pictures = [shapes.draw(0, "val", index, side)[0][:height, :width] for index in range(batch)]
    else:
        paths = sorted(path for path in folder.glob("*") if path.suffix.lower() in (".jpg", ".jpeg", ".png"))
        if not paths:
            raise UserError(f"{folder}: no such folder, or no .jpg, .jpeg or .png in it")
        pictures = [
            cv2.resize(read_rgb(paths[index % len(paths)]), (width, height), interpolation=cv2.INTER_LINEAR)
            for index in range(batch)
        ]
    return torch.from_numpy(np.stack(pictures)).permute(0, 3, 1, 2).contiguous()


def cells(row: dict, ours: list[str]) -> list[str]:
    """The row as the table's cells."""
    seconds, ratio, scaling = (row.get(key, {}) for key in ("seconds", "ratio", "scaling"))
    text = [row["size"], str(row["batch"]), str(row.get("repeats", "-"))]
    text += [f"{1000 * seconds[run]:.1f}" if run in seconds else NOT_MEASURED for run in ("baseline", *ours)]
    text += [f"{ratio[run]:.2f}" if run in ratio else NOT_MEASURED for run in ours]
    text += [f"{scaling[run]:.2f}" if run in scaling else NOT_MEASURED for run in ours[1:]]
    return [*text, f"{row['difference']:.1e}" if "difference" in row else NOT_MEASURED]


def print_line(cells: list[str], widths: list[int]) -> None:
    print("  ".join(f"{cell:>{width}}" for cell, width in zip(cells, widths, strict=True)), flush=True)


def training(name: str, options: argparse.Namespace) -> list[dict]:
    from benchmarks import step_speed  # here, as it imports this file

    return getattr(step_speed, name)(options)


BENCHMARKS: dict[str, Callable[[argparse.Namespace], list[dict]]] = {  # each prints its table and returns its rows
    "bilateral": functools.partial(compare, "bilateral", "plain C++", bilateral_rivals, float("inf")),
    "crf": functools.partial(compare, "crf", "pydensecrf", crf_rivals, CRF_VALUES),
    "step": functools.partial(training, "step"),
    "parts": functools.partial(training, "parts"),
    "data": functools.partial(training, "data"),
    "ddp": functools.partial(training, "ddp"),
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
    parser.add_argument("--batch", type=numbers, help="default 1,4,8 (crf: without the largest); training: 4 (ddp: 1)")
    parser.add_argument("--threads", type=numbers, default="1,2")
    parser.add_argument("--repeats", type=number, help="default: what fits into a few seconds a case")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--images", type=Path, help="folder of images, resized to the size; default: generated shapes")
    parser.add_argument("--crop", type=number, default=448, help="of training: side of the crops")
    parser.add_argument("--backbone", default="vit_base_patch16_224", help="step, ddp: a plain timm ViT")
    parser.add_argument("--precision", type=precisions, default="fp32", help="step: fp32, bf16 or fp32,bf16")
    parser.add_argument("--no-baseline", dest="baseline", action="store_false", help="step: ours alone")
    parser.add_argument("--json", type=Path, help="file to write")
    options = parser.parse_args(argv)
    if options.json:
        options.json.parent.mkdir(parents=True, exist_ok=True)
    about = machine(options.device)
    print(", ".join(f"{key}: {value}" for key, value in about.items()))
    rows = [row for name in options.benchmarks for row in BENCHMARKS[name](options)]
    if options.json:
        options.json.write_text(json.dumps({"machine": about, "rows": rows}, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    run_script(main)
