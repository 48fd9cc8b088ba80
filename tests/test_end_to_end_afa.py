"""AFA goes the whole way through the scripts and tools that all methods share."""

import json
import math
import shutil

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from engine.launch import DEVICE
from engine.checkpoints.hub import HubMethod
from engine.checkpoints.opening import open_checkpoint
from engine.config import load_config
from engine.inference import batch
from engine.inference.plan import evaluation_plan
from model import build_method
from model.afa.method import AFA
from model.afa.official import official_name
from scripts import train_voc
from tests import tiny
from tools import export_masks, infer_voc, make_report, predict, release, submit_voc
from utils.log import read_metrics

SETTINGS = [
    "config=afa_voc", "model.backbone=mit_b0", "model.weights=random", "model.decoder_channels=8",
    "model.drop_path=0.3",
    "model.backbone_args={embed_dims: [8,16,24,32], depths: [1,1,1,2], num_heads: [1,2,2,4]}", "data.crop_size=64",
    "data.workers=0", "train.batch_size=4", "train.iterations=6", "train.warmup_iterations=2", "train.lr=1e-3",
    "train.log_every=1", "train.checkpoint_every=2", "train.validate_every=6", "train.picture_every=3",
    "pseudo_labels.walk_after=3", "pseudo_labels.radius=2", "loss.start_after.seg=1", "loss.start_after.affinity=1",
    "evaluate.long_side=64",
]
KINDS = ["cam", "affinity_cam", "seg"]


def train(root, output, *more):
    train_voc.main(["tag=afa", f"data.root={root}", f"output={output}", *SETTINGS, *more])


def terms(run):
    lines = [line for line in read_metrics(run / "metrics.jsonl") if "train/total" in line]
    return [[line[f"train/{name}"] for name in ("cls", "seg", "affinity", "total")] for line in lines]


@pytest.fixture(scope="module")
def run(voc_root, tmp_path_factory):
    """(root, run): tiny images, and a run of AFA on them."""
    output = tmp_path_factory.mktemp("runs")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv(DEVICE, "cpu")
        train(voc_root, output)
    return voc_root, output / "afa"


@pytest.fixture(autouse=True)
def on_cpu(monkeypatch):
    monkeypatch.setenv(DEVICE, "cpu")


def test_training(run):
    _, folder = run
    losses = terms(folder)
    assert len(losses) == 6 and all(math.isfinite(value) for line in losses for value in line)
    assert losses[1][0] == losses[1][3] and losses[2][0] < losses[2][3]   # cls alone, then all terms
    (validated,) = [line for line in read_metrics(folder / "metrics.jsonl") if "val/seg" in line]
    assert {f"val/{kind}" for kind in KINDS} <= set(validated)
    assert (folder / "checkpoints/best.weights.safetensors").is_file()


@pytest.mark.parametrize("stopped", [3, 5])
def test_resume_is_exact(run, tmp_path, stopped):
    """Dropout, drop-path and batch statistics included; stopped before and after a checkpoint's iteration."""
    root, folder = run
    with tiny.interrupted(AFA, stopped):
        train(root, tmp_path)
    train(root, tmp_path, "resume=auto")
    tiny.assert_same_weights(tiny.last_weights(tmp_path / "afa"), tiny.last_weights(folder))
    assert terms(tmp_path / "afa")[-1] == terms(folder)[-1]


def test_two_processes_follow_one(run, tmp_path):
    """Batch norm over both, global counts; without dropout and drop-path, whose draws differ by process."""
    root, _ = run
    same = ["model.drop_path=0", "model.dropout=0", "train.iterations=12", "train.validate_every=100", "train.lr=1e-4"]
    for count in (1, 2):
        settings = [f"data.root={root}", f"output={tmp_path}", *SETTINGS, *same]
        done = tiny.fork("scripts/train_voc.py", f"tag=on_{count}", *settings, count=count)
        assert done.returncode == 0, done.stderr
    assert "batch norm" in (tmp_path / "on_2" / "train.log").read_text()
    one, two = terms(tmp_path / "on_1"), terms(tmp_path / "on_2")
    assert len(one) == len(two) == 12
    for alone, shared in zip(one, two, strict=True):
        assert shared == pytest.approx(alone, rel=1e-5, abs=1e-7)
    ours, theirs = (load_file(tiny.last_weights(tmp_path / f"on_{count}", 12)) for count in (1, 2))
    for name in ("running_var", "num_batches_tracked"):   # not the mean, which follows biases without a true gradient
        name = f"network.decoder.norm.{name}"
        torch.testing.assert_close(ours[name], theirs[name], rtol=1e-4, atol=1e-5)


def test_evaluation(run):
    root, folder = run
    done = tiny.fork("tools/infer_voc.py", tiny.last_weights(folder), f"data.root={root}", count=2)
    assert done.returncode == 0, done.stderr
    rows = json.loads((folder / "results.json").read_text())
    assert [row["map"] for row in rows] == KINDS
    assert [row["image_labels"] for row in rows] == ["given", "given", None]
    assert "affinity CAM: voc val, 4 images, multi scale (1 0.5 1.5), flip, no CRF, image labels given" in done.stdout
    assert "long side 64" in done.stdout
    infer_voc.main([str(tiny.last_weights(folder)), f"data.root={root}"])
    alone = json.loads((folder / "results.json").read_text())[len(rows):]
    assert [row["iou"] for row in alone] == [row["iou"] for row in rows]


def test_prediction_export_and_submission(run, tmp_path):
    root, folder = run
    weights, images, classes = str(tiny.last_weights(folder)), str(root / "JPEGImages"), 20
    predict.main([weights, images, "--output", str(tmp_path / "out"), "--device", "cpu", "evaluate.long_side=96",
                  "--kinds", *KINDS])
    for kind in KINDS:
        assert len(list((tmp_path / "out" / "labels" / kind).glob("*.png"))) == 12
    for kind in KINDS:
        out = tmp_path / kind
        export_masks.main([weights, "--output", str(out), "--map", kind, f"data.root={root}"])
        masks = sorted(out.glob("*.png"))
        assert len(masks) == 8
        for mask in masks:
            assert set(np.unique(Image.open(mask)).tolist()) <= {0, 255, *range(1, classes + 1)}
    voc = tmp_path / "voc"
    shutil.copytree(root, voc)
    lists = voc / "ImageSets/Segmentation"
    shutil.copy(lists / "val.txt", lists / "test.txt")
    submit_voc.main([weights, "--root", str(voc), "--output", str(tmp_path / "a.tgz"), "--map", "affinity_cam"])
    assert (tmp_path / "a.tgz").is_file()


def test_an_image_without_predicted_classes_gets_those_of_the_segmentation(run, monkeypatch):
    """The affinity CAM needs image labels itself, so it cannot stand in for the classifier."""
    _, folder = run
    opened, asked = open_checkpoint(str(tiny.last_weights(folder))), []

    def coarse_scores(self, images, kind):
        asked.append(kind)
        return torch.eye(21)[None, :, :, None]

    monkeypatch.setattr(AFA, "classify", lambda self, images: torch.full((len(images), 20), -1.0))
    monkeypatch.setattr(AFA, "coarse_scores", coarse_scores)
    plan = evaluation_plan(opened.config)._replace(predicted="classifier", min_pixels=1)
    prediction = batch.predict(opened.method, torch.zeros(3, 64, 64), None, plan)
    assert asked == ["seg"] and prediction.present.all()


def test_report_and_release(run, tmp_path):
    root, folder = run
    infer_voc.main([str(tiny.last_weights(folder)), f"data.root={root}"])
    make_report.main([str(folder), "--output", str(tmp_path / "report.html")])
    page = (tmp_path / "report.html").read_text()
    assert "affinity CAM" in page and "pseudo_labels.walk_after" in page
    release.main([str(folder), str(tmp_path / "released")])
    released = HubMethod.from_checkpoint(str(tmp_path / "released"))
    images = torch.linspace(-2, 2, 3 * 64 * 64).reshape(1, 3, 64, 64)
    made = released.maps(images, KINDS)
    theirs = HubMethod(open_checkpoint(str(folder / "checkpoints/best.weights.safetensors")), {}).maps(images, KINDS)
    assert made["affinity_cam"].shape == made["seg"].shape == (1, 21, 64, 64)
    assert all(torch.equal(made[kind], theirs[kind]) for kind in KINDS)


def test_a_file_of_the_authors_opens(tmp_path):
    """A state dict under the released names, as torch.save writes it, with and without `module.`."""
    torch.manual_seed(0)
    method = build_method(load_config("afa_voc", ["model.weights=random"]), 20)
    weights = {f"module.{official_name(name)}": value for name, value in method.network.state_dict().items()}
    torch.save(weights, tmp_path / "afa.pth")
    opened = open_checkpoint(str(tmp_path / "afa.pth"))
    assert isinstance(opened.method, AFA) and len(opened.classes) == 20
    ours = opened.method.state_dict()
    assert all(torch.equal(ours[name], value) for name, value in method.state_dict().items())
