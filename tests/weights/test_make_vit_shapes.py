"""The demo's start weights: the script that makes them, and the file that is shipped."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from engine.config import load_config
from model import build_method
from weights import make_vit_shapes

ROOT = Path(__file__).resolve().parents[2]
CLASSES = 6


@pytest.fixture(scope="module")
def config():
    return load_config("more_shapes", [])


def start(config, path):
    """The demo's method, started from the weights at `path`."""
    method = build_method(config, CLASSES)
    method.load_start_weights(load_file(path))
    return method


def test_the_script_makes_weights_the_demo_starts_from(config, tmp_path):
    out = tmp_path / "new" / "weights.safetensors"
    arguments = ["--images", "16", "--iterations", "2", "--batch", "2"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "weights/make_vit_shapes.py", str(out), *arguments]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr
    assert "held-out" in done.stdout and str(out) in done.stdout
    method, weights = start(config, out), load_file(out)
    assert torch.equal(method.network.backbone.blocks[0].mlp.fc1.weight, weights["blocks.0.mlp.fc1.weight"].float())
    assert torch.equal(method.network.backbone.tokens[0, -1], weights["cls_token"][0, 0].float())


def test_loss_terms():
    """Against a loop: the token, the mean of the largest patches, and the lower half of the patches, a class."""
    of_token, of_patches = torch.randn(2, CLASSES), torch.randn(2, 6, CLASSES)
    labels = torch.randint(2, (2, CLASSES)).float()
    token, patches, lower = make_vit_shapes.loss_terms(of_token, of_patches, labels, top=2)
    terms = {"token": [], "patches": [], "lower": []}
    for b in range(2):
        for k in range(CLASSES):
            sign, ranked = 2 * labels[b, k] - 1, sorted(of_patches[b, :, k].tolist())
            terms["token"].append(torch.log1p(torch.exp(-sign * of_token[b, k])))
            terms["patches"].append(torch.log1p(torch.exp(-sign * (ranked[-1] + ranked[-2]) / 2)))
            terms["lower"] += [torch.log1p(torch.exp(torch.tensor(x))) for x in ranked[:3]]
    for value, slow in zip((token, patches, lower), terms.values(), strict=True):
        torch.testing.assert_close(value, torch.stack(slow).mean())


def test_images_of_the_weights_are_not_those_of_the_demo(config):
    images, labels = make_vit_shapes.images_and_labels(4)
    again, _ = make_vit_shapes.images_and_labels(4)
    assert config.data.shapes.seed != make_vit_shapes.SEED
    assert torch.equal(images, again) and images.dtype == torch.uint8
    assert labels.shape == (4, CLASSES) and set(labels.unique().tolist()) <= {0.0, 1.0} and labels.any(1).all()


def test_the_shipped_weights(config):
    path = ROOT / config.model.weights
    assert path.stat().st_size <= 5_000_000
    assert all(value.isfinite().all() for value in load_file(path).values())
    start(config, path)
