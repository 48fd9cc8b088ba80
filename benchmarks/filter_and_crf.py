"""The compiled filter and the dense CRF that stands on it, against their baselines."""

import argparse
import dataclasses
import functools
import importlib
import statistics
import sys
import time
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.measure import interleaved, load_images, load_plain_filter, median_ratio, seconds_of
from bilateralfilter import DenseCRF, bilateral_filter
from engine.config import load_config
from utils.crf import dense_crf

SIGMA_RGB, SIGMA_XY = 15.0, 50.0
LEAST_REPEATS, MOST_REPEATS, SECONDS = 3, 9, 4  # without --repeats: as many as fit into so many seconds a case
CRF_VALUES = 17_000_000                         # without --batch, crf leaves out cases of more probabilities
BILATERAL_DIFFERENCE = {"cpu": 1e-5, "cuda": 1e-4}
CRF_DIFFERENCE = 1e-3
NOT_MEASURED = "not measured"


def bilateral(options: argparse.Namespace) -> list[dict]:
    """Prints a table, returns its rows."""
    return compare("bilateral", "plain C++", bilateral_rivals, float("inf"), options)


def crf(options: argparse.Namespace) -> list[dict]:
    """Prints a table, returns its rows."""
    return compare("crf", "pydensecrf", crf_rivals, CRF_VALUES, options)


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


def crf_rivals(images: Tensor, channels: int, device: str) -> Rivals:
    parameters = load_config().crf.model_dump(exclude={"backend", "background_power"})
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


def against_cpu(size: tuple[int, ...], prepare: Callable[[Tensor, int, str], Rivals], device: str) -> dict:
    """size: B, C, H, W. ms: of ours on the device, the median of 9; difference: from ours on the CPU."""
    batch, channels, *shape = size
    rivals = {}
    for run in ("cpu", device):
        torch.manual_seed(0)
        rivals[run] = prepare(load_images(None, batch, *shape), channels, run)
    expected, ours = rivals["cpu"].ours(), rivals[device]
    difference = ours.difference(ours.ours().cpu(), expected)   # and it warms up
    if not difference <= ours.allowed:
        sys.exit(f"error: at {size} {device} and CPU differ by {difference:.1e}, more than {ours.allowed:.0e}")
    return {"ms": 1000 * statistics.median(seconds_of(ours.ours, device) for _ in range(9)), "difference": difference}


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
    times = interleaved({run: functools.partial(_timed, *turn) for run, turn in turns.items()}, row["repeats"])
    row["seconds"] = {run: statistics.median(times[run]) for run in times}
    row["ratio"] = {run: median_ratio(times["baseline"], times[run]) for run in ours if rivals.baseline is not None}
    row["scaling"] = {run: median_ratio(times[ours[0]], times[run]) for run in ours[1:]}
    return row


def _timed(call: Callable[[], Tensor], device: str, threads: int) -> float:
    torch.set_num_threads(threads)
    return seconds_of(call, device)


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
