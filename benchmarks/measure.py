"""What the benchmarks share: images, the clock, a count of operators, and the plain filter that is compared with."""

import functools
import os
import statistics
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import cv2
import numpy as np
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from datasets import shapes
from utils.batch import Batch, most_classes
from utils.errors import UserError
from utils.files import ROOT
from utils.images import normalize, read_rgb

CLASSES = 20
HOST_READS = tuple(f"aten.{name}" for name in (
    "_local_scalar_dense", "nonzero", "equal", "masked_select", "unique", "bincount"))


def seconds_of(call: Callable[[], object], device: str) -> float:
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


def interleaved(timers: Mapping[str, Callable[[], float]], repeats: int) -> dict[str, list[float]]:
    """The seconds that every timer gives in every repeat, in which they take turns."""
    times: dict[str, list[float]] = {name: [] for name in timers}
    for _ in range(repeats):
        for name, timer in timers.items():
            times[name].append(timer())
    return times


def median_ratio(of: Sequence[float], to: Sequence[float]) -> float:
    return statistics.median(a / b for a, b in zip(of, to, strict=True))


class Counter(TorchDispatchMode):
    """Counts operators: `operators`, those that compute (views are none), and `host_reads`, which wait for a GPU."""

    def __init__(self) -> None:
        super().__init__()
        self.operators = self.host_reads = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.operators += not function.is_view
        result, name = function(*args, **(kwargs or {})), str(function)
        by = args[1] if name.startswith(("aten.index.", "aten.index_put")) else ()
        by_mask = any(index is not None and index.dtype == torch.bool for index in by)
        copied = name.startswith("aten._to_copy") and args[0].device.type != "cpu" and result.device.type == "cpu"
        self.host_reads += name.startswith(HOST_READS) or by_mask or copied
        return result


def load_images(folder: Path | None, batch: int, height: int, width: int) -> Tensor:
    """uint8 (batch, 3, height, width): the folder's images from the first on, over and over; without it shapes."""
    if folder is None:
        side = max(height, width, 32)
        pictures = [shapes.draw(0, "val", index, side)[0][:height, :width] for index in range(batch)]
    else:
        paths = image_files(folder)
        pictures = [
            cv2.resize(read_rgb(paths[index % len(paths)]), (width, height), interpolation=cv2.INTER_LINEAR)
            for index in range(batch)
        ]
    return torch.from_numpy(np.stack(pictures)).permute(0, 3, 1, 2).contiguous()


def image_files(folder: Path) -> list[Path]:
    """Raises UserError where there is none."""
    paths = sorted(path for path in folder.glob("*") if path.suffix.lower() in (".jpg", ".jpeg", ".png"))
    if not paths:
        raise UserError(f"{folder}: no such folder, or no .jpg, .jpeg or .png in it")
    return paths


def batch_of(images: Tensor, device: str) -> Batch:
    """uint8 images (B, 3, H, W) with one to three classes each, in turn."""
    normal = torch.stack([normalize(image.permute(1, 2, 0).numpy()) for image in images])
    labels = torch.zeros(len(images), CLASSES)
    for index in range(len(images)):
        labels[index, [(7 * index + 3 * k) % CLASSES for k in range(1 + index % 3)]] = 1
    valid = torch.ones(len(images), *images.shape[2:], dtype=torch.bool)
    batch = Batch([""] * len(images), normal, labels, valid, torch.arange(len(images)), most_classes(labels))
    return batch.to(torch.device(device))


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
