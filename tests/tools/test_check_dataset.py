"""tools/check_dataset.py: every fault is found, all at once, and none where there is none."""

import json
import shutil

import numpy as np
import pytest
from PIL import Image

from datasets.check import NOTE
from tools import check_dataset
from utils.errors import UserError
from utils.images import write_label_png


def redraw(root, rule, *numbers):
    for path in (root / "SegmentationClassAug" / f"tiny_{number:03d}.png" for number in numbers):
        write_label_png(path, rule(np.array(Image.open(path))))


def run(root, *more):
    check_dataset.main([f"data.root={root}", "--workers", "1", *map(str, more)])


def test_every_fault_at_once(tiny_voc, tmp_path, capsys):
    images, masks = (tiny_voc / name for name in ("JPEGImages", "SegmentationClassAug"))
    with open(tiny_voc / "ImageSets" / "Segmentation" / "train_aug.txt", "a") as file:
        file.write("gone\nother\ntwo words here\ntiny_007\ntiny_008\n")
    (tiny_voc / "none.txt").write_text("\n")
    (images / "tiny_000.jpg").write_bytes((images / "tiny_000.jpg").read_bytes()[:600])
    shutil.copy(images / "tiny_001.jpg", images / "tiny_004.jpg")   # in train_aug both
    shutil.copy(images / "tiny_010.jpg", images / "tiny_007.jpg")   # of val
    (masks / "tiny_001.png").write_bytes(b"x")
    redraw(tiny_voc, lambda ids: ids[:9], 2)
    redraw(tiny_voc, lambda ids: np.full_like(ids[:9], 33), 3)   # of another size, too
    redraw(tiny_voc, lambda ids: np.where(ids, ids, 20), 6)
    redraw(tiny_voc, lambda ids: np.where(ids, 5, 0), 8, 10, 11)
    (masks / "tiny_009.png").unlink()
    labels = json.loads((tiny_voc / "labels.json").read_text())
    labels |= {"tiny_005": ["unicorn"], "nobody": ["cat"], "gone": ["cat"]}
    del labels["tiny_004"]
    (tiny_voc / "labels.json").write_text(json.dumps(labels))
    found = {}
    for workers in (1, 2):
        file = tmp_path / f"{workers}.json"
        with pytest.raises(SystemExit, match="^1$"):
            run(tiny_voc, "--splits", "train_aug", "val", "none", "--workers", workers, "--show", 1, "--json", file)
        found[workers] = json.loads(file.read_text())
        assert not found[workers]["clean"]
    assert found[1]["faults"] == found[2]["faults"]
    expected = {
        "list that cannot be read": [None], "no image for a line of a list": [None] * 3, "named twice in a list": [7],
        "missing mask": [9], "broken image": [0], "broken mask": [1], "mask of another size": [2, 3],
        "unknown id in a mask": [3], "no labels, or wrong ones": [5, 4], "masks of other classes": [None],
        "labels of an image that no list names": ["nobody"], NOTE: [2, 8, 10, 11], "image in two splits": [8],
        "mask shows a class that its labels lack": [6, 8, 10, 11], "same pixels in two splits": [7],
        "same pixels twice in a split": [1],
    }
    ours = {kind: [fault["name"] for fault in found[1]["faults"] if fault["kind"] == kind] for kind in expected}
    assert ours == {kind: [f"tiny_{name:03d}" if isinstance(name, int) else name for name in names]
                    for kind, names in expected.items()}
    assert found[1]["counts"] == {kind: len(names) for kind, names in expected.items()}
    printed = capsys.readouterr().out
    assert f"       3  no image for a line of a list\n            {images}/gone.jpg: image of " in printed
    assert "other.jpg" not in printed and "            and 2 more\n" in printed
    assert "so 3 of 3 masks hold no class of the labels" in printed


def test_what_is_no_fault(tiny_voc, capsys):
    run(tiny_voc)
    assert "8 images in train_aug, 4 images in val; 12 images and 12 masks read" in (out := capsys.readouterr().out)
    assert "nothing is wrong" in out
    redraw(tiny_voc, lambda ids: ids * 0, 0)
    run(tiny_voc)
    assert f"       1  {NOTE}" in capsys.readouterr().out
    for number in range(8):   # training needs none
        (tiny_voc / "SegmentationClassAug" / f"tiny_{number:03d}.png").unlink()
    run(tiny_voc)
    for wanted in ("data.masks=own", "data.image_labels=masks", "data.val_split=train_aug"):
        with pytest.raises(SystemExit, match="^1$"):
            run(tiny_voc, wanted)
        assert "       8  missing mask" in capsys.readouterr().out


@pytest.mark.parametrize(("arguments", "words"), [
    (["data.root=nowhere"], "nowhere: no such folder"), (["--splits", "trian"], "split 'trian' not found"),
    (["data.image_labels=x.json"], r"x\.json: no such file"), (["--workers", "0"], "'0' is no number"),
])
def test_mistakes_of_the_call(tiny_voc, arguments, words):
    with pytest.raises(UserError, match=words):
        run(tiny_voc, *arguments)
