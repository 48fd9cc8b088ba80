"""A run small enough for a test: settings, and the launchers as a user calls them."""

import multiprocessing
import os
import resource
import runpy
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from multiprocessing import connection
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from engine.launch import DEVICE, ERROR_FILE, LAUNCHER, check_port, environment
from datasets.voc import CLASSES
from engine.checkpoints.files import WEIGHTS, save_weights
from engine.config import load_config, portable
from model import build_method
from model.method import Method
from scripts import train_voc

ROOT = Path(__file__).resolve().parents[1]
ITERATIONS = 6
SETTINGS = [
    "model.weights=random", "model.backbone=vit_tiny_patch16_224", "model.decoder_channels=16",
    "model.backbone_args={embed_dim: 32, depth: 3, num_heads: 2, img_size: 64, patch_size: 8}",
    "data.crop_size=64", "data.workers=0", "train.batch_size=4", f"train.iterations={ITERATIONS}",
    "train.warmup_iterations=2", "train.lr=1e-3", "train.log_every=1", "train.checkpoint_every=3",
    f"train.validate_every={ITERATIONS}", f"train.picture_every={ITERATIONS}", "pseudo_labels.main_cam_after=3",
    "loss.start_after.seg=1", "loss.start_after.energy=1", "evaluate.base_size=64", "evaluate.scales.seg=[1.0]",
]

_forks = multiprocessing.get_context("forkserver")   # its processes begin with the scripts' imports done
_forks.set_forkserver_preload(["tests.tiny"])


def bash(script: str, *arguments: object, cwd: Path = ROOT, timeout: int = 180) -> subprocess.CompletedProcess:
    """Runs a launcher of the project; its output is text."""
    command = ["bash", str(ROOT / script), *map(str, arguments)]
    return subprocess.run(command, cwd=cwd, capture_output=True, text=True, timeout=timeout, check=False)


def train(root: Path, output: Path, *overrides: str, tag: str = "tiny", count: int = 1, cwd: Path = ROOT):
    """run_train.sh on the VOC tree `root`, on `count` CPU processes."""
    settings = [f"data.root={root}", f"output={output}", *SETTINGS, *overrides]
    return bash("run_train.sh", "scripts/train_voc.py", "cpu", count, "auto", tag, *settings, cwd=cwd)


def train_alone(root: Path, output: Path, *overrides: str, tag: str = "tiny", count: int = 1):
    """`train` without its launcher."""
    return fork("scripts/train_voc.py", f"tag={tag}", f"data.root={root}", f"output={output}", *SETTINGS, *overrides,
                count=count)


def fork(script: str, *arguments: object, count: int = 1) -> subprocess.CompletedProcess:
    """A script or tool on `count` processes that meet as a launcher's do, sooner as nothing is imported.

    As there, all end with the first that fails, whose code is returned, and its mistake stands in one line.
    """
    with tempfile.TemporaryDirectory() as folder:
        given = {**os.environ, **environment(None, count), "WORLD_SIZE": str(count), "LOCAL_WORLD_SIZE": str(count),
                 "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(check_port("auto")), ERROR_FILE: f"{folder}/error"}
        given.pop(LAUNCHER)
        shared = (script, [*map(str, arguments)], given)
        processes = left = [_forks.Process(target=_run, args=(rank, folder, *shared)) for rank in range(count)]
        for process in processes:
            process.start()
        while left and not any(process.exitcode for process in processes):
            if not connection.wait([process.sentinel for process in left], 180):
                break
            left = [process for process in left if process.is_alive()]
        code = next((process.exitcode for process in processes if process.exitcode), 0)
        for process in processes:
            process.kill()
            process.join()
        assert code or not left, f"{script} hangs"
        said = ["".join(Path(folder, f"{stream}{rank}").read_text() for rank in range(count)) for stream in (1, 2)]
        mistake = Path(folder, "error")
        return subprocess.CompletedProcess(
            arguments, code, said[0], said[1] + (f"error: {mistake.read_text()}\n" if mistake.exists() else ""))


def _run(rank: int, folder: str, script: str, arguments: list[str], given: dict[str, str]) -> None:
    for stream in (1, 2):
        os.dup2(os.open(f"{folder}/{stream}{rank}", os.O_WRONLY | os.O_CREAT | os.O_TRUNC), stream)
    os.environ.clear()
    os.environ.update(given, RANK=str(rank), LOCAL_RANK=str(rank))
    torch.set_num_threads(int(given["OMP_NUM_THREADS"]))
    _become(script, arguments)


def start_alone(arguments: list[str], log: Path) -> multiprocessing.Process:
    """scripts/train_voc.py in a process of its own, which is not waited for; what it says is added to `log`."""
    process = _forks.Process(target=_run_alone, args=(arguments, log))
    process.start()
    return process


def _run_alone(arguments: list[str], log: Path) -> None:
    for stream in (1, 2):
        os.dup2(os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND), stream)
    os.environ[DEVICE] = "cpu"
    _become("scripts/train_voc.py", arguments)


def _become(script: str, arguments: list[str]) -> None:
    sys.argv = [str(ROOT / script), *arguments]
    runpy.run_path(sys.argv[0], run_name="__main__")


def text_of(path: Path) -> str:
    """Of a file that may be gone."""
    try:
        return path.read_text(errors="replace")
    except OSError:
        return ""


def train_toy(root: Path, output: Path, *more: str) -> None:
    """The method of tests/toy for 3 epochs, 6 iterations, in this process; to be registered by the test."""
    train_voc.main([
        "method=toy", "tag=toy", f"data.root={root}", f"output={output}", "model.weights=random", "data.crop_size=32",
        "data.workers=0", "train.log_every=1", "train.checkpoint_every=2", "train.picture_every=3",
        "train.validate_every=4", *more,
    ])


@contextmanager
def interrupted(method: type[Method], iteration: int) -> Iterator[None]:
    """The training within it has to be broken off before this iteration."""
    losses = method.losses

    def stopped(self, batch, done):
        if done == iteration:
            raise KeyboardInterrupt
        return losses(self, batch, done)

    with pytest.MonkeyPatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(method, "losses", stopped)
        yield


def assert_same_weights(one: Path, other: Path) -> None:
    """Two weights files are equal to the last bit."""
    ours, theirs = load_file(one), load_file(other)
    assert ours.keys() == theirs.keys() and all(torch.equal(ours[name], theirs[name]) for name in ours)


@contextmanager
def full_disk(size: int) -> Iterator[None]:
    """No file can become larger than `size` bytes: what writes fails as on a full disk, naming no file."""
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, limits[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)


def last_weights(run: Path, iteration: int = ITERATIONS) -> Path:
    """The weights a run wrote after `iteration` steps."""
    return run / "checkpoints" / WEIGHTS.format(iteration)


def save_checkpoint(path: Path, *overrides: str) -> Path:
    """A weights file of the tiny method for the VOC classes, with random weights; its name is returned."""
    torch.manual_seed(0)
    config = load_config("more_voc", [*SETTINGS, *overrides])
    meta = {"method": "more", "classes": list(CLASSES), "settings": portable(config)}
    save_weights(path, build_method(config, len(CLASSES)), meta)
    return path
