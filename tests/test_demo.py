"""run_demo.sh: which config it runs, into which folder, and what it says of it."""

import shutil
import subprocess
import sys

import pytest

from tests.test_user_errors import assert_one_line
from tests.tiny import ROOT, bash


@pytest.fixture
def house(tmp_path):
    """The project with launchers that only write down how they are called."""
    for name in ("run_train.sh", "run_evaluate_voc.sh", "utils/install.sh", ".venv/bin/python", "runs/log"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(f'echo "{name} $*" >> {tmp_path}/runs/log\n')
    shutil.copytree(ROOT / "configs", tmp_path / "configs")
    with (tmp_path / "run_train.sh").open("a") as script:
        script.write("mkdir -p runs/$5/checkpoints; touch runs/$5/checkpoints/iter_000001.weights.safetensors\n")
    (tmp_path / ".venv/bin/python").write_text(
        f'#!/bin/sh\n[ "$1" = tools/make_report.py ] || PYTHONPATH={ROOT} exec {sys.executable} "$@"\n')
    (tmp_path / ".venv/bin/python").chmod(0o755)
    shutil.copy(ROOT / "run_demo.sh", tmp_path)
    return tmp_path


@pytest.mark.parametrize(("arguments", "tag", "config", "training", "pictures"), [
    ([], "demo", "more", "training MoRe on generated shapes (config more_shapes), from weights/vit_shapes.safetensors",
     "runs/demo/pictures  (input, mask, CAM, LAM, segmentation side by side)"),
    (["method=afa", "seed=1"], "demo_afa", "afa",
     "training AFA on generated shapes (config afa_shapes), from weights/mit_shapes.safetensors",
     "runs/demo_afa/pictures  (input, mask, CAM, affinity CAM, segmentation side by side)"),
    (["method=acr"], "demo_acr", "acr",
     "training ACR on generated shapes (config acr_shapes), from weights/vit_shapes.safetensors",
     "runs/demo_acr/pictures  (input, mask, patch CAM, GETAM side by side)"),
])
def test_a_demo(house, arguments, tag, config, training, pictures):
    command = ["bash", house / "run_demo.sh", *arguments]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr
    assert training in done.stdout and pictures in done.stdout
    called, rest = (house / "runs/log").read_text(), "".join(f" {setting}" for setting in arguments[1:])
    assert f" 1 auto {tag} config={config}_shapes output={house}/runs resume=auto{rest}\n" in called
    assert f"/runs/{tag}/checkpoints/iter_000001.weights.safetensors evaluate.save_overlays=" in called


def test_an_unknown_method():
    known = " ".join(sorted(path.stem for path in (ROOT / "configs").glob("*_shapes.yaml")))
    assert_one_line(bash("run_demo.sh", "method=moer"), "method=moer: there is no config moer_shapes", known)
