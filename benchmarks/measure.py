"""What the benchmarks share: images, the clock, a count of operators, and the plain filter that is compared with."""

import functools
import os
import statistics
import sys
import time
import warnings
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import cv2
import numpy as np
import torch
from torch import Tensor
from torch.autograd import DeviceType
from torch.utils._python_dispatch import TorchDispatchMode

from datasets import shapes
from utils.batch import Batch, boxes_of, most_classes
from utils.errors import UserError
from utils.files import ROOT
from utils.images import normalize, read_rgb, write_label_png

CLASSES = 20
HOST_READS = tuple(f"aten.{name}" for name in (
    "_local_scalar_dense", "nonzero", "equal", "masked_select", "unique", "_unique", "bincount", "is_nonzero"))


def clock_of(device: str) -> tuple[Callable[[], object], Callable[[object, object], float], Callable[[], None]]:
    """mark(), seconds_between(mark, mark), and wait(), which comes before a GPU's marks are read."""
    if device == "cpu":
        return time.perf_counter, lambda begin, end: end - begin, lambda: None
    return _event, lambda begin, end: begin.elapsed_time(end) / 1000, torch.cuda.synchronize


def _event() -> torch.cuda.Event:
    event = torch.cuda.Event(enable_timing=True)
    event.record()
    return event


def seconds_of(call: Callable[[], object], device: str) -> float:
    mark, seconds_between, wait = clock_of(device)
    wait()
    begin = mark()
    call()
    end = mark()
    wait()
    return seconds_between(begin, end)


def host_waits(call: Callable[[], object]) -> int:
    """How often the host waits for the GPU within call()."""
    torch.cuda.set_sync_debug_mode("warn")
    try:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            call()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    return sum("synchronizing CUDA operation" in str(warning.message) for warning in caught)


def kernels_of(call: Callable[[], object]) -> dict:
    """kernels: what the GPU runs in call(), copies too; busy: their seconds. Nothing where the profiler sees none."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        call()
        torch.cuda.synchronize()
    ran = [e for e in profile.events() if e.device_type == DeviceType.CUDA and not e.is_user_annotation]
    return {"kernels": len(ran), "busy": sum(e.time_range.elapsed_us() for e in ran) / 1e6} if ran else {}


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
        result, name = function(*args, **(kwargs or {})), str(function)
        self.operators += not (function.is_view or name.startswith("prim"))
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


def write_voc(root: Path, count: int) -> None:
    """Generated images of VOC's most frequent sizes with their masks, in its layout, as split val; 12 differ."""
    (root / "ImageSets" / "Segmentation").mkdir(parents=True)
    (root / "ImageSets" / "Segmentation" / "val.txt").write_text("".join(f"{index:04d}\n" for index in range(count)))
    for folder in (images := root / "JPEGImages", masks := root / "SegmentationClass"):
        folder.mkdir()
    for index in range(count):
        height, width = ((375, 500), (500, 375), (333, 500))[index % 3]
        image, label_map = (x[:height, :width] for x in shapes.draw(0, "val", index % 12, 500))
        cv2.imwrite(str(images / f"{index:04d}.jpg"), image[..., ::-1])
        write_label_png(masks / f"{index:04d}.png", label_map)


def batch_of(images: Tensor, device: str, classes: int = CLASSES) -> Batch:
    """uint8 images (B, 3, H, W) with one to three classes each, in turn."""
    normal = torch.stack([normalize(image.permute(1, 2, 0).numpy()) for image in images])
    labels = torch.zeros(len(images), classes)
    for index in range(len(images)):
        labels[index, [(7 * index + 3 * k) % classes for k in range(1 + index % 3)]] = 1
    valid = torch.ones(len(images), *images.shape[2:], dtype=torch.bool)
    seeds, known = torch.arange(len(images)), (most_classes(labels), boxes_of(valid))
    return Batch([""] * len(images), normal, labels, valid, seeds, *known).to(torch.device(device))


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
