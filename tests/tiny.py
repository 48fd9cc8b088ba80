"""A run small enough for a test: settings, and the launchers as a user calls them."""

import importlib
import multiprocessing
import os
import resource
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from engine.launch import DEVICE, run_script
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
_forks.set_forkserver_preload(["scripts.train_voc"])


def bash(script: str, *arguments: object, cwd: Path = ROOT, timeout: int = 180) -> subprocess.CompletedProcess:
    """Runs a launcher of the project; its output is text."""
    command = ["bash", str(ROOT / script), *map(str, arguments)]
    return subprocess.run(command, cwd=cwd, capture_output=True, text=True, timeout=timeout, check=False)


def train(root: Path, output: Path, *overrides: str, tag: str = "tiny", count: int = 1, cwd: Path = ROOT):
    """run_train.sh on the VOC tree `root`, on `count` CPU processes."""
    settings = [f"data.root={root}", f"output={output}", *SETTINGS, *overrides]
    return bash("run_train.sh", "scripts/train_voc.py", "cpu", count, "auto", tag, *settings, cwd=cwd)


def train_alone(root: Path, output: Path, *overrides: str, tag: str = "tiny") -> subprocess.CompletedProcess:
    """`train` without its launcher: scripts/train_voc.py in a process of its own, sooner as nothing is imported."""
    arguments = [f"tag={tag}", f"data.root={root}", f"output={output}", *SETTINGS, *overrides]
    files = [output.parent / f"{tag}.{stream}" for stream in ("stdout", "stderr")]
    process = _forks.Process(target=_run, args=("scripts.train_voc", arguments, *files))
    process.start()
    process.join(180)
    return subprocess.CompletedProcess(arguments, process.exitcode, *(file.read_text() for file in files))


def start_alone(arguments: list[str], log: Path) -> multiprocessing.Process:
    """scripts/train_voc.py in a process of its own, which is not waited for; what it says is written to `log`."""
    process = _forks.Process(target=_run, args=("scripts.train_voc", arguments, log, log))
    process.start()
    return process


def text_of(path: Path) -> str:
    """Of a file that may be gone."""
    try:
        return path.read_text(errors="replace")
    except OSError:
        return ""


def _run(module: str, arguments: list[str], stdout: Path, stderr: Path) -> None:
    for stream, file in ((1, stdout), (2, stderr)):
        os.dup2(os.open(file, os.O_WRONLY | os.O_CREAT | os.O_TRUNC), stream)
    os.environ[DEVICE] = "cpu"
    sys.argv = [module, *arguments]
    run_script(importlib.import_module(module).main)


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
