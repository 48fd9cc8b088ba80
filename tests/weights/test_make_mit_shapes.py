"""The start weights of AFA's demo and of its short run on photographs: the scripts that make them, the shipped file."""

import os
import subprocess
import sys
from pathlib import Path

import torch
from safetensors.torch import load_file

from engine.config import load_config
from model import build_method
from model.backbones.mit import official_name
from weights import distill_mit, make_mit_shapes

ROOT = Path(__file__).resolve().parents[2]


def started(path):
    """AFA's demo, started from the weights at `path`."""
    method = build_method(load_config("afa_shapes", []), 6)
    method.load_start_weights(load_file(path))
    return method


def test_the_script_makes_weights_the_demo_starts_from(tmp_path):
    out = tmp_path / "new" / "weights.safetensors"
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    arguments = ["--images", "8", "--iterations", "2", "--batch", "2"]
    command = [sys.executable, "weights/make_mit_shapes.py", str(out), *arguments]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr
    assert "variance that is missed" in done.stdout and str(out) in done.stdout
    weights = load_file(out)
    for name, value in started(out).network.backbone.state_dict().items():
        assert torch.equal(value, weights[official_name(name)].float())


def test_the_student_learns_the_tokens_of_the_teacher():
    torch.manual_seed(0)
    teacher = make_mit_shapes.Teacher()
    student, images = make_mit_shapes.Student(teacher.vit.embed_dim), torch.randn(2, 3, 80, 80)
    middle, last = teacher(images)
    assert middle.shape == last.shape == student(images)[0].shape == student(images)[1].shape == (2, 100, 192)
    x, vit = teacher.vit._pos_embed(teacher.vit.patch_embed(images)), teacher.vit
    for index, block in enumerate(vit.blocks):
        x = block(x)
        if index == make_mit_shapes.BLOCK:
            close_to_standardised(middle, x)
    close_to_standardised(last, vit.norm(x))


def close_to_standardised(ours, tokens):
    tokens = tokens[:, 1:].detach().flatten(0, 1)
    plain = (tokens - tokens.mean(0)) / (tokens.var(0, unbiased=False) + 1e-5).sqrt()
    torch.testing.assert_close(ours.flatten(0, 1), plain, rtol=1e-3, atol=1e-3)


def test_the_shipped_weights():
    path = ROOT / load_config("afa_shapes", []).model.weights
    assert path.stat().st_size <= 5_000_000
    assert all(value.isfinite().all() for value in load_file(path).values())
    started(path)


def test_photographs_are_learned_stage_by_stage():
    """With a teacher of random maps, as its package is no part of the project."""
    torch.manual_seed(0)

    def teacher(images):
        side = images.shape[-1]
        maps = [torch.randn(len(images), count, side // stride, side // stride)
                for count, stride in zip(distill_mit.CHANNELS, (4, 8, 16, 32), strict=True)]
        return maps, torch.full((len(images), distill_mit.CLASSES), 1 / distill_mit.CLASSES)

    student = distill_mit.Student("mit_b0")
    terms = distill_mit.loss_terms(student, teacher, torch.rand(2, 3, 64, 64) * 255)
    assert list(terms) == ["classes", "stage1", "stage2", "stage3", "stage4"]
    sum(terms.values()).backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in student.parameters())
