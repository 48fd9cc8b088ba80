"""tools/score.py: the numbers of evaluations and exports again, of files of this project and of others."""

import re
import shutil

import numpy as np
import pytest
import torch
from PIL import Image

from engine.distributed import Ranks
from engine.evaluation.checkpoint import evaluate_checkpoint
from tests import tiny
from tools import export_masks, score
from utils.errors import UserError

NAMES = [f"tiny_{index:03d}" for index in range(8, 12)]


@pytest.fixture
def masks(tiny_voc, tmp_path):
    """The true masks of val alone."""
    (tmp_path / "masks").mkdir()
    for name in NAMES:
        shutil.copy(tiny_voc / "SegmentationClassAug" / f"{name}.png", tmp_path / "masks")
    return tmp_path / "masks"


def numbers(text: str) -> str:
    """What stands before the heading of the last line."""
    return re.findall(r"^(mIoU.*) \|", text, re.MULTILINE)[-1]


def test_files_of_an_evaluation_and_of_exports_score_the_same(tiny_voc, tmp_path, capsys):
    weights = tiny.save_checkpoint(tmp_path / "tiny.safetensors")
    root, found, ranks = f"data.root={tiny_voc}", {}, Ranks(0, 1, torch.device("cpu"))
    saved = ["evaluate.maps=[seg]", f"evaluate.save_labels={tmp_path}"]
    evaluate_checkpoint(ranks, str(weights), [root, "data.workers=0", *saved])
    found["seg"] = numbers(capsys.readouterr().out)
    for folder, more in {
        "unsure": ["--high", "0.6", "--low", "0.4"], "png": ["--high", "0.5", "--low", "0.5"],
        "npy": ["--format", "npy"],
    }.items():
        where = ["--output", str(tmp_path / folder), "--split", "val", "--map", "cam", root, "data.workers=0"]
        export_masks.main([str(weights), *where, *more])
        found[folder] = numbers(capsys.readouterr().out)
    for folder, line in found.items():
        score.main([str(tmp_path / folder), "--root", str(tiny_voc)])
        out = capsys.readouterr().out
        assert numbers(out) == line and f"{folder}: voc val, 4 images" in out and "precision" in out
        assert ("% of the pixels unsure and left out" in out) == (folder == "unsure")
        assert ("background 0.5" in out) == (folder == "npy")
    assert found["png"] == found["npy"] != found["unsure"]


def test_true_masks_are_right_and_others_left_aside(tiny_voc, masks, capsys):
    """PNGs, and maps of projects that keep no high_res."""
    shutil.copy(masks / "tiny_008.png", masks / "other.png")
    paths, arguments = list(masks.iterdir()), [str(masks), f"data.root={tiny_voc}", "--split", "val"]
    score.main(arguments)
    for bkg, words in (("0.3", "alone for --bkg"), ("nan", "--bkg nan: expected 0 to 1")):
        with pytest.raises(UserError, match=words):
            score.main([*arguments, "--bkg", bkg])
    for path in paths:
        ids = np.array(Image.open(path))
        maps = [ids == k for k in np.unique(ids)[1:]]
        np.save(path.with_suffix(".npy"), {"keys": np.unique(ids)[1:] - 1, "cam": torch.tensor(np.array(maps)).half()})
        path.unlink()
    score.main([*arguments, "--bkg", "0.3"])
    out = capsys.readouterr().out
    assert out.count("mIoU 100.00 over 5 classes present, pixel accuracy 100.00") == 2 and "background 0.3, 1 f" in out


class Hostile:
    def __reduce__(self):
        return print, ("code of the file ran",)


def only_npy(**content):
    def edit(masks):
        for path in list(masks.iterdir()):
            path.unlink()
            np.save(path.with_suffix(".npy"), content)
    return edit


@pytest.mark.parametrize(("edit", "message"), [
    (lambda masks: [path.unlink() for path in masks.iterdir()], r"expected .*holds \[\]"),
    (lambda masks: np.save(masks / "tiny_008.npy", 1), r"expected .*holds \['.npy', '.png'\]"),
    (lambda masks: (masks / "tiny_009.png").rename(masks / "nine.png"),
     "1 of the 4 images of val have no file: tiny_009; files of other images: nine"),
    (lambda masks: Image.new("L", (7, 5)).save(masks / "tiny_009.png"),
     r"masks/tiny_009\.png is 7x5, but its mask in the data .*tiny_009\.png is 64x"),
    (lambda masks: Image.new("L", (64, 60), 21).save(masks / "tiny_009.png"), r"masks/tiny_009\.png: mask holds id 21"),
    (only_npy(keys=[20], high_res=np.zeros((1, 60, 64))), r"npy: no dictionary .*\[20\], .* 0\.\.19"),
    (only_npy(keys=[2], high_res=np.zeros((1, 9, 9))), r"npy is 9x9, but its mask in the data"),
    (only_npy(keys=[2, 3], high_res=np.zeros((1, 9, 9))), r"npy: no dictionary .*\(1, 9, 9\)"),
    (only_npy(keys=Hostile(), cam=1), r"npy: no dictionary .*asks for builtins\.print"),
])
def test_mistakes(tiny_voc, masks, edit, message, capsys):
    edit(masks)
    with pytest.raises(UserError, match=message):
        score.main([str(masks), "--root", str(tiny_voc)])
    assert "ran" not in capsys.readouterr().out
