"""Sharing: a saved folder gives the same outputs to the last bit; torch.hub finds the project from anywhere."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from engine.checkpoints.files import read_meta, save_weights
from engine.checkpoints.hub import HubMethod
from engine.checkpoints.opening import open_checkpoint
from engine.config import load_config, portable
from model import build_method
from model.method import MapPlan
from utils.errors import UserError

ROOT = Path(__file__).resolve().parents[3]
ARGS = "{embed_dim: 32, depth: 3, num_heads: 2, img_size: 32, patch_size: 8}"
SMALL = ["model.backbone=vit_tiny_patch16_224", f"model.backbone_args={ARGS}", "model.decoder_channels=16"]
IMAGES = torch.linspace(-2, 2, 3 * 40 * 48).reshape(1, 3, 40, 48)
NOTE = {"iteration": 7, "val": {"seg": 0.5}, "config": "tag"}


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    """A weights file of a training."""
    torch.manual_seed(0)
    config = load_config("more_voc", [*SMALL, "evaluate.bkg=0.25", "data.root=/home/me/voc"])
    path = tmp_path_factory.mktemp("run") / "w.safetensors"
    meta = {**NOTE, "method": "more", "classes": ["nut", "bolt"], "settings": portable(config)}
    save_weights(path, build_method(config, 2), meta)
    return path


def outputs(model):
    maps = model.maps(IMAGES, dict.fromkeys(("seg", "cam", "lam"), MapPlan((1.0, 0.5), flip=True)), None)
    return [model.classify(IMAGES), *maps.values()]


def test_round_trip_to_the_last_bit(weights, tmp_path):
    first = HubMethod.from_checkpoint(str(weights))
    first.save_pretrained(tmp_path / "shared")
    assert sorted(p.name for p in (tmp_path / "shared").iterdir()) == ["README.md", "config.json", "model.safetensors"]
    second = HubMethod.from_pretrained(tmp_path / "shared")
    second.save_pretrained(tmp_path / "again")
    third = HubMethod.from_pretrained(str(tmp_path / "again"), overrides=["evaluate.flip=false"])
    own = outputs(open_checkpoint(str(weights)).method)
    for model in (first, second, third):
        assert all(torch.equal(ours, theirs) for ours, theirs in zip(outputs(model), own, strict=True))
        assert model.classes == ("nut", "bolt") and model.config.evaluate.bkg == 0.25 and not model.training
    assert not third.config.evaluate.flip
    by_name = second.maps(IMAGES, ["cam", "seg"])
    assert by_name.keys() == {"cam", "seg"} and torch.equal(second(IMAGES), by_name["seg"])
    assert torch.equal(by_name["seg"], second.method.maps(IMAGES, {"seg": MapPlan((1.0,), flip=False)}, None)["seg"])
    assert (tmp_path / "shared/model.safetensors").read_bytes() == (tmp_path / "again/model.safetensors").read_bytes()


def test_what_a_saved_folder_says(weights, tmp_path):
    HubMethod.from_checkpoint(str(weights)).save_pretrained(tmp_path)
    meta = read_meta(tmp_path / "model.safetensors")
    assert meta == json.loads((tmp_path / "config.json").read_text()) == read_meta(weights)
    assert meta.items() > NOTE.items() and meta["settings"]["data"]["root"] is None
    card = (tmp_path / "README.md").read_text()
    assert card.startswith("---\n") and "pipeline_tag: image-segmentation" in card
    assert "# more, vit_tiny_patch16_224" in card and "from 1 on: nut, bolt." in card and "{{" not in card
    assert 'model.maps(images, ["seg"])' in card
    assert "| `lam` | LAM | (B, K, H, W) in [0, 1] |\n" in card
    assert "| `seg` | segmentation | (B, K+1, H, W) scores, background first |\n" in card


def test_a_folder_with_other_weights_is_refused(weights, tmp_path):
    shared = HubMethod.from_checkpoint(str(weights))
    shared.save_pretrained(tmp_path)
    save_weights(tmp_path / "model.safetensors", shared.method.network.decoder, shared.meta)
    with pytest.raises(UserError, match=r"model\.safetensors: official MoRe weights: key .* is missing"):
        HubMethod.from_pretrained(tmp_path)


@pytest.mark.parametrize("entry", ["more", "load"])
def test_torch_hub_from_another_folder(weights, tmp_path, entry):
    torch.save(outputs(open_checkpoint(str(weights)).method), tmp_path / "own.pt")
    code = f"""
import torch
torch.set_num_threads(1)
settings = ["evaluate.crf=true"]
model = torch.hub.load({str(ROOT)!r}, {entry!r}, source="local", weights={str(weights)!r}, overrides=settings)
images = torch.linspace(-2, 2, 3 * 40 * 48).reshape(1, 3, 40, 48)
from model.method import MapPlan
maps = model.maps(images, dict.fromkeys(("seg", "cam", "lam"), MapPlan((1.0, 0.5), flip=True)))
for ours, theirs in zip([model.classify(images), *maps.values()], torch.load("own.pt"), strict=True):
    torch.testing.assert_close(ours, theirs)
print(model.classes, model.config.evaluate.crf)
"""
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert "('nut', 'bolt') True" in done.stdout


def test_a_package_that_hides_ours_is_named(tmp_path):
    """Hugging Face's `datasets` in the same environment, imported before the project or found first."""
    (tmp_path / "datasets").mkdir()
    (tmp_path / "datasets" / "__init__.py").write_text("")
    code = "import datasets, sys\nsys.path.remove('')\nimport engine"
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, timeout=60)
    assert f"{tmp_path}/datasets/__init__.py hides this project's package 'datasets'" in done.stderr
