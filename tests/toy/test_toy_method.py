"""A method that the project knows nothing of (tests/toy/method.py) goes the whole way, without a line anywhere else."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from engine.checkpoints.hub import HubMethod
from engine.checkpoints.opening import open_checkpoint
from model import METHODS
from tests import tiny
from tests.toy import method
from tools import export_masks, infer_voc, make_report, predict, release

LENGTH = 6   # 3 epochs of 8 images, 4 together


@pytest.fixture(autouse=True)
def registered(monkeypatch):
    monkeypatch.setitem(METHODS, "toy", method.Toy)


@pytest.fixture(scope="module")
def run(voc_root, tmp_path_factory):
    """(root, run): tiny images, and a run of the toy method on them."""
    folder = tmp_path_factory.mktemp("toy")
    METHODS["toy"] = method.Toy
    tiny.train_toy(voc_root, folder / "runs")
    return voc_root, folder / "runs" / "toy"


def weights(run: Path) -> Path:
    return tiny.last_weights(run, LENGTH)


def test_training_by_epochs_with_sgd(run):
    _, folder = run
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    losses = [line["train/total"] for line in lines if "train/total" in line]
    assert len(losses) == LENGTH and losses[-1] < losses[0]
    validated = [line for line in lines if "val/regions" in line]
    assert [sorted(line)[3:] for line in validated] == [["val/evidence", "val/regions"]] * 2
    assert all(line["classes_present"] == 5 for line in validated)
    assert (folder / "checkpoints" / "best.weights.safetensors").is_file()


def test_resume_is_exact(run, tmp_path):
    """Dropout, batch norm, momentum included: stopped in the last of six steps, after the checkpoint of the fourth."""
    root, folder = run
    with tiny.interrupted(method.Toy, LENGTH - 1):
        tiny.train_toy(root, tmp_path)
    assert not weights(tmp_path / "toy").exists()
    tiny.train_toy(root, tmp_path, "resume=auto")
    tiny.assert_same_weights(weights(tmp_path / "toy"), weights(folder))


def test_evaluation_on_one_and_two_processes(run, tmp_path):
    root, folder = run
    arguments = [str(weights(folder)), f"data.root={root}", "evaluate.crf=true", "crf.iterations=1"]
    infer_voc.main(arguments)
    alone = json.loads((folder / "results.json").read_text())
    done = tiny.fork(method.__file__, "tools.infer_voc", *arguments, count=2)
    assert done.returncode == 0, done.stderr
    both = json.loads((folder / "results.json").read_text())[len(alone):]
    assert [row["map"] for row in both] == ["evidence", "evidence", "regions", "regions"]
    assert [row["image_labels"] for row in both] == ["given", "given", None, None]
    for ours, theirs in zip(both, alone, strict=True):
        assert (ours["miou"], ours["iou"]) == (theirs["miou"], theirs["iou"])
    assert "evidence: voc val, 4 images, single scale (1), flip, CRF, image labels given" in done.stdout


def test_prediction_and_export(run, tmp_path):
    root, folder = run
    predict.main([str(weights(folder)), str(root / "JPEGImages"), "--output", str(tmp_path / "out"), "--device", "cpu",
                  "--kinds", "evidence", "regions"])
    for kind in ("evidence", "regions"):
        assert len(list((tmp_path / "out" / "labels" / kind).glob("*.png"))) == 12
    export_masks.main([str(weights(folder)), "--output", str(tmp_path / "masks"), f"data.root={root}"])
    masks = sorted((tmp_path / "masks").glob("*.png"))
    opened = open_checkpoint(str(weights(folder)))
    ids = {0, 255, *range(1, len(opened.classes) + 1)}
    assert len(masks) == 8 and all(set(np.unique(Image.open(mask)).tolist()) <= ids for mask in masks)


def test_report_and_release(run, tmp_path):
    root, folder = run
    infer_voc.main([str(weights(folder)), f"data.root={root}"])
    make_report.main([str(folder), "--output", str(tmp_path / "report.html")])
    page = (tmp_path / "report.html").read_text()
    assert "evidence" in page and "regions" in page and "loss.area_after" in page
    release.main([str(folder), str(tmp_path / "released")])
    released = HubMethod.from_checkpoint(str(tmp_path / "released"))
    images = torch.linspace(-2, 2, 3 * 32 * 32).reshape(1, 3, 32, 32)
    made = released.maps(images, ["evidence", "regions"])
    opened = open_checkpoint(str(folder / "checkpoints" / "best.weights.safetensors"))
    theirs = HubMethod(opened, {}).maps(images, ["evidence", "regions"])
    assert made["regions"].shape == (1, 21, 32, 32) and made["evidence"].shape == (1, 20, 32, 32)
    assert all(torch.equal(made[kind], theirs[kind]) for kind in made)
