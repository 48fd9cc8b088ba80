"""COCO layout through its launchers: 81 ids, padded crops, segmentation at native size; also on real images."""

import json

import numpy as np
import pytest
from PIL import Image

from tests import tiny
from tools import prepare_coco

COUNTS = {"train": 6, "val": 3}


@pytest.fixture
def root(tmp_path):
    """9 images of about 64 px; every one shows a rectangle of class 1 + 9 * i, the last one class 80."""
    rng = np.random.default_rng(0)
    lists, number = tmp_path / "coco" / "ImageSets" / "Segmentation", 0
    lists.mkdir(parents=True)
    for split, count in COUNTS.items():
        names = []
        for _ in range(count):
            name = f"COCO_{split}2014_{number:012d}"
            mask = np.zeros((60, 70 + number), np.uint8)
            mask[15:45, 20:50] = min(1 + 9 * number, 80)
            image = rng.integers(0, 255, (*mask.shape, 3), dtype=np.uint8) // 3 + mask[..., None]
            for folder, picture, ending in (("JPEGImages", image, "jpg"), ("SegmentationClass", mask, "png")):
                path = tmp_path / "coco" / folder / f"{split}2014" / f"{name}.{ending}"
                path.parent.mkdir(parents=True, exist_ok=True)
                Image.fromarray(picture).save(path)
            names.append(name)
            number += 1
        (lists / f"{split}.txt").write_text("\n".join(names))
    return tmp_path / "coco"


def test_train_and_evaluate(root, tmp_path):
    settings = [f"data.root={root}", f"output={tmp_path}", "data.image_labels=masks", "data.val_split=val"]
    done = tiny.bash(
        "run_train.sh", "scripts/train_coco.py", "cpu", 1, "auto", "coco", *settings, *tiny.SETTINGS,
        "loss.start_after={ptc: 0, certain: 0, uncertain: 0, seg: 0, energy: 0}",
    )
    assert done.returncode == 0, done.stderr
    weights = tiny.last_weights(tmp_path / "coco")
    given = [weights, "evaluate.base_size=null", "evaluate.scales.seg=[1.0,1.5]"]
    for done in (tiny.fork("tools/infer_seg_coco.py", *given, "data.val_split=val"),
                 tiny.bash("run_evaluate_seg_coco.sh", "tools/infer_seg_coco.py", "cpu", 2, "val", *given)):
        assert done.returncode == 0, done.stderr
    first, second = json.loads((tmp_path / "coco" / "results.json").read_text())
    assert first["map"] == "seg" and first["split"] == "val" and first["images"] == 3 and len(first["iou"]) == 81
    own = {"seconds": 0, "evaluation": ""}   # when, and how long
    assert {**first, **own} == {**second, **own}


@pytest.fixture
def real(shared_data, tmp_path):
    """A few real images, from official annotations made ready by tools/prepare_coco.py."""
    for split, count in COUNTS.items():
        content = json.loads((shared_data / f"coco_mini/annotations/instances_{split}2014.json").read_text())
        content["images"] = sorted(content["images"], key=lambda image: image["height"] * image["width"])[:count]
        kept = {image["id"] for image in content["images"]}
        content["annotations"] = [shape for shape in content["annotations"] if shape["image_id"] in kept]
        (tmp_path / f"instances_{split}2014.json").write_text(json.dumps(content))
    images = shared_data / "coco_mini/JPEGImages"
    given = [tmp_path / "real", "--annotations", tmp_path, "--image-folder", images, "--workers", "1"]
    prepare_coco.main(list(map(str, given)))
    return tmp_path / "real"


def test_prepared_real_images(real, tmp_path):
    done = tiny.fork(
        "scripts/train_coco.py", "tag=real_run", f"data.root={real}", f"output={tmp_path}", *tiny.SETTINGS,
        "train.iterations=2", "train.validate_images=1",
        "loss.start_after={ptc: 0, certain: 0, uncertain: 0, seg: 0, energy: 0}",
    )
    assert done.returncode == 0, done.stderr
    assert "6 training images (train), 3 validation images (val_part), 80 classes" in done.stdout + done.stderr
    weights = tiny.last_weights(tmp_path / "real_run", 2)
    settings = ["data.val_split=val", "evaluate.base_size=null", "evaluate.scales.seg=[0.5]"]
    done = tiny.fork("tools/infer_seg_coco.py", weights, *settings)
    assert done.returncode == 0, done.stderr
    (row,) = json.loads((tmp_path / "real_run" / "results.json").read_text())
    assert row["images"] == 3 and len(row["iou"]) == 81 and 0 <= row["miou"] <= 1
    labels = json.loads((real / "labels.json").read_text())
    val = (real / "ImageSets/Segmentation/val.txt").read_text().split()
    present = {name for image in val for name in labels[image]}
    assert {name for name in present if row["iou"][name] is None} == set()
