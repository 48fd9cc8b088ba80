"""The second stage goes the whole way: masks of tools/export_masks.py, scripts/train_seg.py, and the tools of all."""

import json
import math
import os
import random
import re
import signal
import subprocess
import time

import pytest
import torch
from safetensors.torch import load_file

from engine.launch import DEVICE
from engine.checkpoints.hub import HubMethod
from engine.checkpoints.opening import open_checkpoint
from model.deeplab.method import DeepLab
from scripts import train_seg
from tests import tiny
from tools import export_masks, infer_voc, make_report, predict, release, submit_voc, sweep
from utils.errors import UserError
from utils.log import read_metrics

SETTINGS = [
    "config=deeplab_voc", "model.weights=random", "data.crop_size=64", "data.workers=0", "train.batch_size=4",
    "train.iterations=6", "train.log_every=1", "train.checkpoint_every=2", "train.picture_every=3",
    "train.validate_every=6", "evaluate.base_size=64",
]
LARGEFOV = [
    "model.architecture=largefov", "model.backbone=vit_tiny_patch16_224", "model.decoder_channels=16",
    "model.backbone_args={embed_dim: 32, depth: 2, num_heads: 2, img_size: 64, patch_size: 8}",
    "data.augmentation=resized_crop", "data.resize_range=[0.4, 1.0]",
]
RESNET = ["model.backbone=resnet18", "model.batch_norm=synced", "train.lr=1e-3",
          "model.backbone_args={layers: [1, 1, 1, 1], channels: [16, 24, 32, 48]}"]
V3PLUS = [*RESNET, "model.architecture=deeplabv3plus", "model.output_stride=16", "inference.fusion=mean",
          "loss.scales=[1.0]", "loss.at=image", "evaluate.scales={seg: [1.0, 0.5]}", "evaluate.flip=true"]


def train(root, masks, output, *more):
    """In this process."""
    train_seg.main([*SETTINGS, "tag=seg", f"data.root={root}", f"data.masks={masks}", f"output={output}", *more])


def terms(run):
    return [line["train/seg"] for line in read_metrics(run / "metrics.jsonl") if "train/seg" in line]


@pytest.fixture(autouse=True)
def on_cpu(monkeypatch):
    monkeypatch.setenv(DEVICE, "cpu")


@pytest.fixture(scope="module")
def masks(voc_root, tmp_path_factory):
    """Those of an untrained MoRe."""
    folder = tmp_path_factory.mktemp("first")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv(DEVICE, "cpu")
        weights = str(tiny.save_checkpoint(folder / "more.safetensors"))
        high_low = ["--high", "0.6", "--low", "0.4"]
        export_masks.main([weights, "--output", str(folder / "masks"), f"data.root={voc_root}", *high_low])
    return folder / "masks"


@pytest.fixture(scope="module")
def run(voc_root, masks, tmp_path_factory):
    """(root, run of two processes, what was said)."""
    output = tmp_path_factory.mktemp("runs")
    given = [*SETTINGS, f"data.root={voc_root}", f"data.masks={masks}", f"output={output}", *LARGEFOV]
    done = tiny.bash("run_train.sh", "scripts/train_seg.py", "cpu", 2, "auto", "seg", *given)
    assert done.returncode == 0, done.stderr
    return voc_root, output / "seg", done


def test_two_processes_are_one(run, masks, tmp_path):
    root, folder, done = run
    assert f"learns from 8 masks (data.masks={masks})" in done.stdout
    train(root, masks, tmp_path, *LARGEFOV)
    alone = terms(tmp_path / "seg")
    assert len(alone) == 6 and all(map(math.isfinite, alone)) and terms(folder) == pytest.approx(alone, rel=1e-5)
    (validated,) = [line for line in read_metrics(folder / "metrics.jsonl") if "val/seg" in line]
    assert 0 <= validated["val/seg"] <= 1


def test_two_processes_are_one_with_batch_norm(run, masks, tmp_path):
    """Statistics are over all images of the batch, also at every scale of v2's loss."""
    root, short = run[0], [*RESNET, "train.iterations=3", "data.val_split=null"]
    given = [*SETTINGS, f"data.root={root}", f"data.masks={masks}", f"output={tmp_path}", *short]
    done = tiny.fork("scripts/train_seg.py", "tag=two", *given, count=2)
    assert done.returncode == 0, done.stderr
    assert "batch norm: statistics over all processes" in done.stdout
    train(root, masks, tmp_path, *short)
    assert terms(tmp_path / "two") == pytest.approx(terms(tmp_path / "seg"), rel=1e-5)
    ours, theirs = (load_file(tiny.last_weights(tmp_path / tag, 3)) for tag in ("two", "seg"))
    assert all(torch.allclose(ours[name].double(), theirs[name].double(), rtol=1e-4, atol=1e-6) for name in ours)


@pytest.mark.parametrize("settings", [LARGEFOV, V3PLUS], ids=["largefov", "v3plus"])
def test_resume_is_exact(run, masks, tmp_path, settings):
    """With dropout, batch statistics and momentum."""
    root, settings = run[0], [*settings, "train.iterations=4", "data.val_split=null"]
    train(root, masks, tmp_path / "whole", *settings)
    with tiny.interrupted(DeepLab, 3):
        train(root, masks, tmp_path, *settings)
    train(root, masks, tmp_path, *settings, "resume=auto")
    tiny.assert_same_weights(*(tiny.last_weights(tmp_path / one, 4) for one in ("seg", "whole/seg")))
    assert terms(tmp_path / "seg") == terms(tmp_path / "whole/seg")


def test_evaluation(run):
    root, folder, _ = run
    weights = tiny.last_weights(folder)
    done = tiny.fork("tools/infer_voc.py", weights, f"data.root={root}")
    assert done.returncode == 0, done.stderr
    (row,) = json.loads((folder / "results.json").read_text())
    assert row["map"] == "seg" and row["image_labels"] is None
    said = "multi scale (1 0.75 0.5), no flip, no CRF, no image labels used, input 64x64"
    assert f"segmentation: voc val, 4 images, {said}" in done.stdout
    infer_voc.main([str(weights), f"data.root={root}", "evaluate.scales={seg: [1.0]}"])
    infer_voc.main([str(weights), f"data.root={root}"])
    single, again = json.loads((folder / "results.json").read_text())[1:]
    assert again["iou"] == row["iou"] and single["pixel_accuracy"] != row["pixel_accuracy"]


def test_tools(run, tmp_path, capsys):
    root, folder, _ = run
    weights = str(tiny.last_weights(folder))
    predict.main([weights, str(root / "JPEGImages"), "--output", str(tmp_path / "out"), "--device", "cpu"])
    assert len(list((tmp_path / "out/labels").rglob("*.png"))) == 12
    export_masks.main([weights, "--output", str(tmp_path / "masks"), f"data.root={root}"])
    assert len(list((tmp_path / "masks").glob("*.png"))) == 8
    with pytest.raises(UserError, match="map seg has a background of its own"):
        sweep.main([weights, f"data.root={root}"])
    (root / "ImageSets/Segmentation/test.txt").write_text((root / "ImageSets/Segmentation/val.txt").read_text())
    submit_voc.main([weights, "--root", str(root), "--output", str(tmp_path / "a.tgz")])
    infer_voc.main([weights, f"data.root={root}"])
    make_report.main([str(folder), "--output", str(tmp_path / "report.html")])
    assert "segmentation" in (tmp_path / "report.html").read_text()
    release.main([str(folder), str(tmp_path / "released")])
    images = torch.linspace(-2, 2, 3 * 64 * 64).reshape(1, 3, 64, 64)
    made = HubMethod.from_checkpoint(str(tmp_path / "released")).maps(images, ["seg"])["seg"]
    best = HubMethod(open_checkpoint(str(folder / "checkpoints/best.weights.safetensors")), {})
    assert made.shape == (1, 21, 64, 64) and torch.equal(made, best.maps(images, ["seg"])["seg"])


@pytest.mark.slow
def test_pipeline(voc_root, tmp_path):
    """Through run_pipeline.sh itself: both stages, and nothing twice."""
    second = [item for item in [*SETTINGS, *LARGEFOV] if not item.startswith("config=")]
    given = ["cpu", 1, "whole", f"data.root={voc_root}", f"output={tmp_path}", "crf=false", "images=4"]
    given += [*(f"first.{item}" for item in tiny.SETTINGS), *(f"second.{item}" for item in second)]
    done = tiny.bash("run_pipeline.sh", *given, timeout=600)
    assert done.returncode == 0, done.stderr
    scores = json.loads((tmp_path / "whole/pipeline.json").read_text())["scores"]
    assert [row["map"] for row in scores["first"]] == ["cam", "lam", "seg"]
    (row,) = scores["second"]
    assert row["method"] == "deeplab" and row["image_labels"] is None and row["input"] == 64
    assert f"learns from 8 masks (data.masks={tmp_path / 'whole/masks'})" in done.stdout
    again = tiny.bash("run_pipeline.sh", *given)
    assert again.returncode == 0 and again.stdout.count(": done already\n") == 7, again.stderr


@pytest.mark.slow
def test_pipeline_killed_at_random(tmp_path):
    """On shapes: twice killed, somewhere in its time, a pipeline ends as one that was not."""
    short = ["crf.iterations=2", "data.shapes.train=48", "data.shapes.val=24", "images=24", "train.checkpoint_every=10"]
    short += ["first.train.iterations=60", "second.train.iterations=40", "train.validate_every=30", "train.log_every=5"]
    short += ["first.loss.start_after.seg=20", "first.loss.start_after.energy=20", "train.validate_images=8"]

    def start(output):
        given = ["bash", tiny.ROOT / "run_pipeline.sh", "cpu", "1", "tag", "first=more_shapes", "second=deeplab_shapes"]
        log = (output.parent / f"{output.name}.log").open("a")
        return subprocess.Popen([*given, f"output={output}", *short], stdout=log, stderr=log, start_new_session=True)

    begun = time.monotonic()
    assert start(tmp_path / "whole").wait() == 0
    seconds, draw = time.monotonic() - begun, random.Random(os.environ.get("KILL_SEED"))
    moments = [draw.uniform(5, share * seconds) for share in (0.5, 0.3)]   # what is left by then takes longer
    for moment in moments:
        process = start(tmp_path / "killed")
        time.sleep(moment)
        assert process.poll() is None
        os.kill(process.pid, signal.SIGKILL)   # the shell has become the pipeline, with which its steps end
        process.wait()
    assert start(tmp_path / "killed").wait() == 0
    whole, killed = (tmp_path / name / "tag" for name in ("whole", "killed"))
    steps = re.findall(r"^([a-z_]+): (?:bash|\S+/python) ", (tmp_path / "killed.log").read_text(), re.MULTILINE)
    print(f"{seconds:.0f} s, killed after {' and '.join(f'{moment:.1f}' for moment in moments)} s; started: {steps}")
    for stage, iteration in (("first", 60), ("second", 40)):
        tiny.assert_same_weights(*(tiny.last_weights(run / stage, iteration) for run in (whole, killed)))
    masks = [{path.name: path.read_bytes() for path in (run / "masks").glob("*.png")} for run in (whole, killed)]
    assert len(masks[0]) == 48 and masks[0] == masks[1]
    assert _scores(whole) == _scores(killed)


def _scores(folder):
    """Of pipeline.json, without what every run has anew."""
    scores = json.loads((folder / "pipeline.json").read_text())["scores"]
    text = json.dumps(scores).replace(str(folder.parent), "")
    return re.sub(r'"(seconds|evaluation)": ("[^"]*"|[\d.]+)', "", text)
