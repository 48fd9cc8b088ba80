"""Masks to learn from: read, checked before the training, and the same where it goes on."""

import logging
import shutil
from contextlib import nullcontext
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from datasets import TrainSet, build_train_set, collate_train
from engine.config import load_config
from engine.distributed import Ranks
from engine.training import masks as checks
from model import METHODS
from tests import tiny
from tests.toy import method
from utils.errors import UserError
from utils.images import read_label_map, write_label_png
from utils.log import read_metrics

FIRST = "tiny_000"


class Segmenter(method.Toy):
    """The toy method, which learns its regions from masks."""

    learns_from_masks = True
    seen = []   # noqa: RUF012

    def losses(self, batch, iteration):
        self.seen.append(batch)
        scores = F.interpolate(self.head(self.body(batch.images)).float(), batch.masks.shape[1:], mode="bilinear")
        return {"image": F.cross_entropy(scores, batch.masks.long(), ignore_index=255), "area": scores.mean() * 0}


@pytest.fixture(autouse=True)
def registered(monkeypatch):
    monkeypatch.setitem(METHODS, "toy", Segmenter)
    monkeypatch.setattr(Segmenter, "seen", [])


@pytest.fixture
def masks(voc_root, tmp_path):
    """A folder of the true masks of the training images, and of one that is no training image."""
    (tmp_path / "masks").mkdir()
    for index in range(9):
        shutil.copy(voc_root / "SegmentationClassAug" / f"tiny_{index:03d}.png", tmp_path / "masks")
    return tmp_path / "masks"


def to_irn(path: Path, **content) -> None:
    """Puts in the place of a PNG maps that are 0.6 there, and elsewhere 0.1; content: what is different in the file."""
    ids = read_label_map(path, 21)
    keys = np.setdiff1d(ids, [0, 255]) - 1
    maps = np.array([0.1 + 0.5 * (ids == k + 1) for k in keys]).reshape(len(keys), *ids.shape)
    np.save(path.with_suffix(".npy"), {"keys": keys, "high_res": maps, **content})
    path.unlink()


def all_to_irn(folder: Path) -> None:
    for path in list(folder.iterdir()):
        to_irn(path)


def redraw(folder: Path, rule) -> None:
    """Every mask of a folder, by a rule of its ids."""
    for path in folder.iterdir():
        write_label_png(path, rule(read_label_map(path, 21).astype(int)))


def train_set_of(root: Path, given: object) -> TrainSet:
    config = load_config(None, ["method=toy", f"data.root={root}", f"data.masks={given}", "data.crop_size=32"])
    return build_train_set(config)


@pytest.mark.parametrize("edit", [lambda folder: None, all_to_irn, lambda folder: to_irn(folder / f"{FIRST}.png")])
def test_the_same_masks_in_every_form(voc_root, masks, edit):
    edit(masks)
    own, batch = (
        collate_train([train_set[index, 40 + index] for index in range(8)])
        for train_set in (train_set_of(voc_root, "own"), train_set_of(voc_root, masks))
    )
    assert batch.masks.dtype == torch.uint8 and batch.masks.shape == (8, 32, 32) and batch.masks.any()
    assert torch.equal(batch.masks, own.masks) and torch.equal(batch.images, own.images)
    assert batch.to(torch.device("meta")).masks.is_meta


@pytest.mark.parametrize("irn", [False, True])
def test_training_and_what_it_says(voc_root, masks, tmp_path, irn):
    """With a mask of no class, and one of another than its label; irn's maps of coarse `cam` alone among them."""
    ids = [read_label_map(masks / f"tiny_{index:03d}.png", 21) for index in range(8)]
    ids[0][:], ids[1][:9], ids[2][:] = 0, 0 if irn else 255, 7
    for index, one in enumerate(ids):
        write_label_png(masks / f"tiny_{index:03d}.png", one)
    if irn:
        all_to_irn(masks)
        np.save(masks / "tiny_002.npy", {"keys": [6], "cam": np.ones((1, 17, 16))})   # of 68 x 64 pixels
    tiny.train_toy(voc_root, tmp_path, f"data.masks={masks}")
    losses = [line["train/image"] for line in read_metrics(tmp_path / "toy/metrics.jsonl") if "train/image" in line]
    assert losses[-1] < 0.9 * losses[0] and all(len(batch.masks) == 4 for batch in Segmenter.seen)
    pixels, log = np.concatenate([one.ravel() for one in ids]), (tmp_path / "toy/train.log").read_text()
    background, unsure = 100 * (pixels == 0).mean(), 100 * (pixels == 255).mean()
    said = f"{background:.1f} % background, {100 - background - unsure:.1f} % classes, {unsure:.1f} % ignored"
    assert f"learns from 8 masks (data.masks={masks}): {said}; 1 show no class" in log
    assert f"note: 1 of 7 masks hold other classes than the labels: tiny_002 (data.masks={masks})" in log


NO_CLASS = r"data\.masks=.*masks: none of the 8 masks shows a class, all is 0 or 255"
OTHERS = r"\.png: ids .*labels .*; so \d of \d masks .*: were these made with other classes, or of other images"


@pytest.mark.parametrize(("edit", "message"), [
    (lambda path: shutil.rmtree(path.parent), r"masks: no such folder \(data\.masks; own means the"),
    (Path.unlink, r"masks: no .* for 1 of the 8 training images .*: {}$"),
    (lambda path: np.save(path.with_suffix(".npy"), {}), r"masks: holds {0}\.png and {0}\.npy for one image"),
    (lambda path: path.write_bytes(b"x"), r"masks/{}\.png: mask file cannot be read"),
    (lambda path: write_label_png(path, np.ones((9, 11))), r"masks/{0}\.png is 11x9, .*JPEGImages/{0}\.jpg is 64x60"),
    (lambda path: to_irn(path, high_res=np.zeros((1, 9, 11))), r"masks/{0}\.npy is 11x9, .*{0}\.jpg is 64x60"),
    (lambda path: to_irn(path, keys=[20]), r"masks/{}\.npy: no dictionary of keys"),
    (lambda path: write_label_png(path, np.full((60, 64), 21)), r"{}\.png: mask holds id 21, but"),
    (lambda path: redraw(path.parent, lambda ids: ids * 0), NO_CLASS),
    (lambda path: redraw(path.parent, lambda ids: np.where(ids, 255, 0)), NO_CLASS),
    (lambda path: redraw(path.parent, lambda ids: ids + (ids > 0)), OTHERS),               # shifted by one
    (lambda path: redraw(path.parent, lambda ids: np.where(ids, 20 - ids, 0)), OTHERS),   # of other classes
])
def test_masks_that_are_refused_before_any_step(voc_root, masks, tmp_path, edit, message):
    edit(masks / f"{FIRST}.png")
    with pytest.raises(UserError, match=message.format(FIRST)):
        tiny.train_toy(voc_root, tmp_path / "runs", f"data.masks={masks}")
    assert not Segmenter.seen


def test_broken_masks_are_left_out_where_that_is_wanted(voc_root, masks, tmp_path):
    (masks / f"{FIRST}.png").write_bytes(b"x")
    wanted = f"data.masks={masks}", "data.on_error=skip"
    with pytest.raises(UserError, match=rf"1 training images cannot be read, .*: {FIRST}; the first: .*{FIRST}\.png"):
        tiny.train_toy(voc_root, tmp_path / "runs", *wanted, "data.max_errors=0")
    assert not Segmenter.seen
    tiny.train_toy(voc_root, tmp_path, *wanted)
    log = (tmp_path / "toy/train.log").read_text()
    assert log.count(f"will be skipped: {masks}/{FIRST}.png: mask file cannot be read") == 1
    assert sum(len(batch.skipped) for batch in Segmenter.seen) == 3
    assert not any(FIRST in batch.names for batch in Segmenter.seen)


@pytest.mark.parametrize(("learner", "given", "message"), [
    (Segmenter, [], "toy learns from masks: give data.masks=FOLDER, .* or data.masks=own"),
    (method.Toy, ["data.masks=own"], "data.masks=own, but toy learns from image labels alone: leave data.masks out"),
])
def test_masks_and_the_method_go_together(voc_root, tmp_path, monkeypatch, learner, given, message):
    monkeypatch.setitem(METHODS, "toy", learner)
    with pytest.raises(UserError, match=message):
        tiny.train_toy(voc_root, tmp_path, *given)
    assert not (tmp_path / "toy").exists()


@pytest.mark.parametrize(("form", "edit", "setting", "refused"), [
    (None, None, "evaluate.bkg=0.4", False),
    (None, lambda folder: shutil.copy(folder / f"{FIRST}.png", folder / "tiny_003.png"), "seed=0", True),
    (all_to_irn, None, "seed=0", False),
    (all_to_irn, None, "evaluate.bkg=0.4", True),
])
def test_a_run_goes_on_with_its_own_masks_alone(voc_root, masks, tmp_path, form, edit, setting, refused):
    if form:
        form(masks)
    with tiny.interrupted(Segmenter, 2):
        tiny.train_toy(voc_root, tmp_path / "runs", f"data.masks={masks}", "train.iterations=4")
    (tmp_path / "moved").mkdir()
    moved = masks.rename(tmp_path / "moved" / "masks")
    if edit:
        edit(moved)
    with pytest.raises(UserError, match="settings: data.masks holds other masks") if refused else nullcontext():
        tiny.train_toy(voc_root, tmp_path / "runs", f"data.masks={moved}", "train.iterations=4", "resume=auto", setting)
    assert len(Segmenter.seen) == (2 if refused else 4)


def test_every_process_reads_its_share(voc_root, masks, monkeypatch):
    """Three processes find what one does."""
    train_set, logger, cpu, parts = train_set_of(voc_root, masks), logging.getLogger("wsss"), torch.device("cpu"), []
    alone = checks.check_masks(train_set, Ranks(0, 1, cpu), logger)
    monkeypatch.setattr(checks, "gather", lambda part: parts.append(part) or parts)
    for rank in (0, 1, 2):
        with nullcontext() if rank == 2 else pytest.raises(IndexError):   # the other parts are not there yet
            together = checks.check_masks(train_set, Ranks(rank, 3, cpu), logger)
    assert together == alone and [len(part) for _, part in parts] == [3, 3, 2]
