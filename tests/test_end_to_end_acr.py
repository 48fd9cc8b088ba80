"""ACR goes the whole way through the scripts and tools that all methods share."""

import json
import math

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from engine.launch import DEVICE
from engine.checkpoints.hub import HubMethod
from engine.checkpoints.opening import open_checkpoint
from engine.config import load_config
from engine.evaluation.results import title
from model import build_method
from model.acr.method import ACR
from model.acr.official import BACKBONE, UNUSED, official_name
from report.run import evaluate_command
from scripts import train_voc
from tests import tiny
from tools import export_masks, infer_voc, make_report, predict, release, submit_voc, sweep
from utils.errors import UserError
from utils.log import read_metrics

SETTINGS = [
    "config=acr_voc", "model.weights=random", "data.crop_size=64", "data.workers=0", "train.batch_size=4",
    "model.backbone_args={embed_dim: 32, depth: 3, num_heads: 2, img_size: 64, resnet_layers: [1, 1, 1], "
    "resnet_width_factor: 0.5}", "train.lr=1e-3", "train.log_every=1", "train.checkpoint_every=2",
    "train.picture_every=3", "evaluate.base_size=64",
]
TERMS = ("cls", "cls_mirror", "consistency_class", "consistency_affinity", "total")
KINDS = ["cam", "getam"]


def train(root, output, *more):
    train_voc.main(["tag=acr", f"data.root={root}", f"output={output}", *SETTINGS, "train.epochs=3",
                    "train.validate_every=6", *more])


def terms(run):
    lines = [line for line in read_metrics(run / "metrics.jsonl") if "train/total" in line]
    return [[line[f"train/{name}"] for name in TERMS] for line in lines]


@pytest.fixture(scope="module")
def run(voc_root, tmp_path_factory):
    """(root, run): tiny images, and a run of ACR on them."""
    output = tmp_path_factory.mktemp("runs")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv(DEVICE, "cpu")
        train(voc_root, output)
    return voc_root, output / "acr"


@pytest.fixture(autouse=True)
def on_cpu(monkeypatch):
    monkeypatch.setenv(DEVICE, "cpu")


def test_training(run):
    _, folder = run
    losses = terms(folder)
    assert len(losses) == 6   # 3 epochs of 8 images
    for cls, mirror, of_class, affinity, total in losses:
        assert total == pytest.approx(cls + mirror + 125 * (of_class + affinity), rel=1e-5) and math.isfinite(total)
    (validated,) = [line for line in read_metrics(folder / "metrics.jsonl") if "val/getam" in line]
    assert "val/cam" in validated
    assert (folder / "checkpoints/best.weights.safetensors").is_file()


def test_resume_is_exact(run, tmp_path):
    """SGD without momentum has no state of its own."""
    root, folder = run
    with tiny.interrupted(ACR, 3):
        train(root, tmp_path)
    train(root, tmp_path, "resume=auto")
    tiny.assert_same_weights(tiny.last_weights(tmp_path / "acr"), tiny.last_weights(folder))
    assert terms(tmp_path / "acr")[-1] == terms(folder)[-1]


def test_two_processes_follow_one(run, tmp_path):
    """For 20 steps; the released code trains networks of their own that way."""
    root, _ = run
    for count in (1, 2):
        settings = [f"data.root={root}", f"output={tmp_path}", *SETTINGS, "train.iterations=20"]
        settings += ["train.validate_every=100", "train.checkpoint_every=1", "train.picture_every=100"]
        settings.append("train.keep_checkpoints=null")
        done = tiny.fork("scripts/train_voc.py", f"tag=on_{count}", *settings, count=count)
        assert done.returncode == 0, done.stderr
    one, two = terms(tmp_path / "on_1"), terms(tmp_path / "on_2")
    assert len(one) == len(two) == 20 and one[0][-1] != one[-1][-1]
    for alone, shared in zip(one, two, strict=True):
        assert shared == pytest.approx(alone, rel=1e-5, abs=1e-7)
    # signs of the L1 terms amplify rounding: after 20 steps all parameters together agree to 1e-5, one alone to 1e-4
    for iteration, share in ((1, 1e-5), (20, 1e-4)):
        ours, theirs = (load_file(tiny.last_weights(tmp_path / f"on_{count}", iteration)) for count in (1, 2))
        for name, value in ours.items():   # biases start at 0 and stay small: that share of 1 for these
            assert float((value - theirs[name]).norm()) <= share * max(1.0, float(value.norm())), name
    own, other = (torch.cat([weights[name].flatten() for name in sorted(weights)]) for weights in (ours, theirs))
    assert float((own - other).norm()) <= 1e-5 * float(own.norm())


def test_evaluation(run):
    root, folder = run
    done = tiny.fork("tools/infer_voc.py", tiny.last_weights(folder), f"data.root={root}", count=2)
    assert done.returncode == 0, done.stderr
    rows = json.loads((folder / "results.json").read_text())
    assert [row["map"] for row in rows] == KINDS and {row["image_labels"] for row in rows} == {"given"}
    assert "GETAM: voc val, 4 images, single scale (1), flip, no CRF, image labels given, background" in done.stdout
    infer_voc.main([str(tiny.last_weights(folder)), f"data.root={root}"])
    alone = json.loads((folder / "results.json").read_text())[len(rows):]
    assert [row["iou"] for row in alone] == [row["iou"] for row in rows]


def test_sweep_prediction_export_and_submission(run, tmp_path, capsys):
    root, folder = run
    weights, images = str(tiny.last_weights(folder)), str(root / "JPEGImages")
    sweep.main([weights, f"data.root={root}"])
    said = capsys.readouterr().out
    assert "GETAM: voc val" in said and "patch CAM: voc val" in said and "best of 100 backgrounds" in said
    predict.main([weights, images, "--output", str(tmp_path / "out"), "--device", "cpu", "--kinds", *KINDS])
    for kind in KINDS:
        assert len(list((tmp_path / "out" / "labels" / kind).glob("*.png"))) == 12
    for index, how in enumerate((["--high", "0.6", "--low", "0.3"], ["--alphas", "1", "12"])):
        out = tmp_path / f"masks{index}"
        export_masks.main([weights, "--output", str(out), f"data.root={root}", *how])
        masks = sorted(out.glob("*.png"))
        assert len(masks) == 8
        for mask in masks:
            assert set(np.unique(Image.open(mask)).tolist()) <= {0, 255, *range(1, 21)}
    (root / "ImageSets/Segmentation/test.txt").write_text((root / "ImageSets/Segmentation/val.txt").read_text())
    submit_voc.main([weights, "--root", str(root), "--output", str(tmp_path / "a.tgz"), "--map", "getam"])
    assert (tmp_path / "a.tgz").is_file()


def test_getam_of_other_settings(run, tmp_path):
    """Is not taken for what is there already, and its rows and the report's command say so."""
    root, folder = run
    weights, other = str(tiny.last_weights(folder)), "getam.function=cam_grad"
    predict.main(given := [weights, str(root / "JPEGImages"), "--output", str(tmp_path), "--device", "cpu"])
    with pytest.raises(UserError, match="made with settings = .*getam.function.*cam_grad.*another folder"):
        predict.main([*given, other])
    infer_voc.main([weights, f"data.root={root}", other])
    cam, getam = rows = json.loads((folder / "results.json").read_text())[-2:]
    assert "settings" not in cam and getam["settings"] == {"getam.function": "cam_grad"}
    assert other in title(getam) and other in evaluate_command(folder, rows, {})


def test_report_and_release(run, tmp_path):
    root, folder = run
    infer_voc.main([str(tiny.last_weights(folder)), f"data.root={root}"])
    make_report.main([str(folder), "--output", str(tmp_path / "report.html")])
    page = (tmp_path / "report.html").read_text()
    assert "GETAM" in page and "patch CAM" in page
    release.main([str(folder), str(tmp_path / "released")])
    released = HubMethod.from_checkpoint(str(tmp_path / "released"))
    images = torch.linspace(-2, 2, 3 * 64 * 64).reshape(1, 3, 64, 64)
    made = released.maps(images, KINDS)
    theirs = HubMethod(open_checkpoint(str(folder / "checkpoints/best.weights.safetensors")), {}).maps(images, KINDS)
    assert made["getam"].shape == (1, 20, 64, 64)
    assert all(torch.equal(made[kind], theirs[kind]) for kind in KINDS)


def test_a_file_of_the_authors_opens(tmp_path):
    """A state dict under the released names, as torch.save writes it."""
    torch.manual_seed(0)
    method = build_method(load_config("acr_voc_vit", ["model.weights=random"]), 20)
    own = {name: value.clone() for name, value in method.network.state_dict().items()}
    split = [own.pop(f"backbone.{name}") for name in ("token_pos", "patch_pos")]
    weights = {f"{BACKBONE}cls_token": own.pop("backbone.tokens"), f"{BACKBONE}pos_embed": torch.cat(split, 1)}
    weights |= {official_name(name): value for name, value in own.items()}
    weights |= {name: torch.zeros(3) for name in UNUSED}
    torch.save(weights, tmp_path / "acr.pth")
    opened = open_checkpoint(str(tmp_path / "acr.pth"))
    assert isinstance(opened.method, ACR) and len(opened.classes) == 20
    ours = opened.method.state_dict()
    assert all(torch.equal(ours[name], value) for name, value in method.state_dict().items())
