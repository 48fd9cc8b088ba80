"""Fixtures of all tests."""

import json
import os
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from bilateralfilter import _extension

pytest_plugins = ["tests.goldens.plugin"]   # here: the process that starts pytest-xdist's workers opens no folder below
ROOT = Path(__file__).resolve().parents[1]
TINY_CLASSES = {1: "aeroplane", 3: "bird", 8: "cat", 12: "dog"}  # VOC id -> name

# tests that run beside each other share the cores: threads that wait for a core cost more than they bring
BESIDE = int(os.environ.get("PYTEST_XDIST_WORKER_COUNT", 1))
torch.set_num_threads(max(1, min(2, len(os.sched_getaffinity(0)) // BESIDE)))

# the longest files, begun first, so that two workers end at the same time
LONGEST = (
    "bilateralfilter/test_sanitizers.py", "bilateralfilter/test_gpu.py", "benchmarks/test_gpu_suite.py",
    "benchmarks/test_training.py", "test_end_to_end.py", "test_end_to_end_coco.py", "test_end_to_end_seg.py",
    "engine/training/test_on_fake_gpu.py", "engine/test_launch.py", "test_user_errors.py",
    "test_kills.py", "engine/test_nodes.py", "test_end_to_end_nodes.py", "engine/training/test_faults.py",
    "benchmarks/test_benchmark.py", "bilateralfilter/test_extension.py", "engine/training/test_afa_on_fake_gpu.py",
)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if BESIDE > 1:
        places = {ROOT / "tests" / file: place for place, file in enumerate(LONGEST)}
        items.sort(key=lambda item: places.get(item.path, len(places)))


def pytest_runtest_setup(item: pytest.Item) -> None:
    if item.get_closest_marker("gpu") and not (torch.cuda.is_available() and _extension.load("cuda")):
        pytest.skip("no GPU, or no nvcc")


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """The folder of real images, $SHARED_DATA, by default ../shared/data next to the project."""
    folder = Path(os.environ.get("SHARED_DATA") or ROOT.parent / "shared" / "data").resolve()
    if not folder.is_dir():
        pytest.skip(f"no shared data: {folder} does not exist (set SHARED_DATA)")
    return folder


@pytest.fixture(autouse=True)
def no_logger_stays():
    """A training in a test leaves a logger that prints; the next test starts without it."""
    yield
    if "utils.log" in sys.modules:
        sys.modules["utils.log"].close_logger()


@pytest.fixture
def one_thread():
    """torch computes with one thread, as it does for every image of an evaluation: the same bits."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def tiny_voc(tmp_path: Path) -> Path:
    """Root of a small tree in VOC layout (`_make_tiny_voc`), anew for every test."""
    return _make_tiny_voc(tmp_path)


@pytest.fixture(scope="module")
def voc_root(tmp_path_factory) -> Path:
    """The same, once for all tests of a file, which leave it as it is."""
    return _make_tiny_voc(tmp_path_factory.mktemp("data"))


def _make_tiny_voc(folder: Path) -> Path:
    """Root of 12 generated images of about 64 px in VOC layout: train_aug and train 8, val 4, labels.json.

    One or two rectangles in each image, each class of TINY_CLASSES with its own colour, on noise.
    """
    root = folder / "tiny_voc"
    for folder in ("JPEGImages", "SegmentationClassAug", "ImageSets/Segmentation"):
        (root / folder).mkdir(parents=True)
    rng = np.random.default_rng(0)
    labels, names = {}, [f"tiny_{i:03d}" for i in range(12)]
    for i, name in enumerate(names):
        height, width = 60 + i % 3 * 4, 64
        image = rng.integers(90, 166, (height, width, 3), dtype=np.uint8)
        mask = np.zeros((height, width), np.uint8)
        present = [list(TINY_CLASSES)[(i + j) % len(TINY_CLASSES)] for j in range(1 + i % 2)]
        for j, label in enumerate(present):
            top, left = rng.integers(4, 20, 2)
            box = (slice(top, top + 30), slice(left + 24 * j, left + 24 * j + 20))
            image[box] = image[box] // 4 + np.array([label * 15, 255 - label * 20, 60 * (label % 4)], np.uint8) // 2
            mask[box] = label
        Image.fromarray(image).save(root / "JPEGImages" / f"{name}.jpg", quality=95)
        Image.fromarray(mask).save(root / "SegmentationClassAug" / f"{name}.png")
        labels[name] = [TINY_CLASSES[label] for label in sorted(set(np.unique(mask)) - {0})]
    for split, members in {"train_aug": names[:8], "train": names[:8], "val": names[8:]}.items():
        (root / "ImageSets/Segmentation" / f"{split}.txt").write_text("\n".join(members) + "\n")
    (root / "labels.json").write_text(json.dumps(labels))
    return root
