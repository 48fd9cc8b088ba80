"""tools/prepare_coco.py against masks made another way, on real annotations and on hand-made ones."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from pycocotools.coco import COCO

from datasets import build_train_set, build_val_set
from datasets.coco import CLASSES
from datasets.prepare import coco
from engine.config import load_config
from tools import prepare_coco
from utils.errors import UserError

IDS = [*range(1, 12), *range(13, 26), 27, 28, *range(31, 45), *range(46, 66), 67, 70, *range(72, 83), *range(84, 91)]
HEIGHT, WIDTH = 20, 30


def arguments(out, annotations, images, *more):
    given = [out, "--annotations", annotations, "--image-folder", images, "--workers", 1, *more]
    return [str(argument) for argument in given]


def box(x, y, w, h):
    """A polygon around whole pixels."""
    return [[x, y, x + w, y, x + w, y + h, x, y + h]]


def crowd(x, y, w, h):
    """Uncompressed RLE of the same box: lengths of 0s and 1s, column by column."""
    inside = np.zeros((HEIGHT, WIDTH), np.uint8)
    inside[y : y + h, x : x + w] = 1
    flat = inside.ravel(order="F")
    ends = np.flatnonzero(np.diff(flat)) + 1
    counts = np.diff([0, *ends, flat.size]).tolist()
    return {"size": [HEIGHT, WIDTH], "counts": [0, *counts] if flat[0] else counts}


def annotation(image, category, shape, area, iscrowd=0):
    return {"image_id": image, "category_id": category, "segmentation": shape, "area": area, "iscrowd": iscrowd}


@pytest.fixture
def made(tmp_path):
    """A COCO folder of four training images, one of them without annotation, and one to validate on."""
    annotations = [
        annotation(9, 1, box(0, 0, 20, 10), 200), annotation(9, 18, box(5, 2, 4, 4), 16),      # a dog on a person
        annotation(9, 90, crowd(10, 5, 20, 15), 300, 1),                                       # a crowd behind both
        annotation(3, 44, box(2, 2, 6, 6), 36), annotation(3, 62, box(5, 5, 6, 6), 36),        # of the same area
        annotation(5, 2, box(4, 4, 8, 8), 64), annotation(5, 3, crowd(0, 0, 20, 15), 300, 1),  # a bicycle that nobody
        annotation(5, 4, box(2, 2, 12, 12), 20),                                               # sees: `area` decides
    ]
    content = {"train": ([9, 3, 5, 7], annotations), "val": ([4], [annotation(4, 13, box(0, 0, 5, 5), 25)])}
    for split, (numbers, shapes) in content.items():
        names = {number: f"COCO_{split}2014_{number:012d}.jpg" for number in numbers}
        images = [{"id": k, "file_name": name, "height": HEIGHT, "width": WIDTH} for k, name in names.items()]
        categories = [{"id": k, "name": name} for k, name in zip(IDS, CLASSES, strict=True)]
        shapes = [{"id": k, "bbox": [0, 0, 1, 1], **shape} for k, shape in enumerate(shapes, 1)]
        whole = {"images": images, "annotations": shapes, "categories": categories[::-1]}
        (tmp_path / f"instances_{split}2014.json").write_text(json.dumps(whole))
        (tmp_path / f"{split}2014").mkdir()
        for name in names.values():
            Image.new("RGB", (WIDTH, HEIGHT)).save(tmp_path / f"{split}2014" / name)
    return tmp_path


def snapshot(root):
    return {str(path.relative_to(root)): path.read_bytes() for path in root.rglob("*") if path.is_file()}


def ids(path):
    return np.array(Image.open(path))


def pixelwise(coco, image):
    """The mask in another way: at every pixel the category of the smallest annotation over it, the first of equals."""
    shapes = coco.loadAnns(coco.getAnnIds(image["id"]))
    covered = np.stack([coco.annToMask(shape) for shape in shapes]).astype(bool)
    areas = np.array([shape["area"] for shape in shapes])[:, None, None]
    front = np.where(covered, areas, np.inf).argmin(0)
    labels = np.array([1 + IDS.index(shape["category_id"]) for shape in shapes])[front]
    return np.where(covered.any(0), labels, 0)


@pytest.fixture(scope="module")
def mini(shared_data, tmp_path_factory):
    """The prepared images of coco_mini, and where they come from."""
    out, source = tmp_path_factory.mktemp("coco") / "out", shared_data / "coco_mini"
    prepare_coco.main(arguments(out, source / "annotations", source / "JPEGImages", "--workers", 2))
    return out, source


@pytest.mark.parametrize("split", ["train", "val"])
def test_real_masks_equal_those_made_another_way(split, mini):
    out, source = mini
    coco = COCO(str(source / f"annotations/instances_{split}2014.json"))
    labels = json.loads((out / "labels.json").read_text())
    images, crowds = list(coco.imgs.values()), 0
    assert len(images) == len(list((out / f"SegmentationClass/{split}2014").iterdir())) == 80
    for image in images:
        name = Path(image["file_name"]).stem
        mask = ids(out / f"SegmentationClass/{split}2014/{name}.png")
        assert np.array_equal(mask, pixelwise(coco, image))
        assert labels[name] == [CLASSES[k - 1] for k in np.unique(mask) if k]
        crowds += any(shape["iscrowd"] for shape in coco.imgToAnns[image["id"]])
    assert crowds > 0


def test_data_sets_read_it(mini):
    out, _ = mini
    config = load_config("more_coco", [f"data.root={out}", "data.crop_size=64"])
    train, val = build_train_set(config), build_val_set(config, "val")
    assert build_val_set(config).names == val.names == sorted(val.names) and len(val) == len(train) == 80
    assert len(train.classes) == 80 and train[0, 0].image.shape == (3, 64, 64)
    masks = build_train_set(load_config("more_coco", [f"data.root={out}", "data.image_labels=masks"]))
    assert all(torch.equal(train.labels_of(sample), masks.labels_of(sample)) for sample in train.samples)
    assert (out / f"JPEGImages/train2014/{train.names[0]}.jpg").is_symlink()


def test_overlaps_crowds_and_lists(made, capsys):
    out = made / "out"
    prepare_coco.main(arguments(out, made, made))
    expected = {number: np.zeros((HEIGHT, WIDTH), np.uint8) for number in (9, 3, 5)}
    expected[9][5:20, 10:30] = 80
    expected[9][0:10, 0:20] = 1
    expected[9][2:6, 5:9] = 17
    expected[3][5:11, 5:11] = 57
    expected[3][2:8, 2:8] = 40
    expected[5][0:15, 0:20] = 3
    expected[5][2:14, 2:14] = 4
    for number, mask in expected.items():
        name = f"COCO_train2014_{number:012d}"
        assert np.array_equal(ids(out / f"SegmentationClass/train2014/{name}.png"), mask)
    lists = {path.stem: path.read_text().split() for path in (out / "ImageSets/Segmentation").iterdir()}
    val = ["COCO_val2014_000000000004"]
    assert lists == {"train": [f"COCO_train2014_{k:012d}" for k in (3, 5, 9)], "val": val, "val_part": val}
    seen, annotated = (json.loads((out / name).read_text()) for name in ("labels.json", "labels_annotations.json"))
    hidden = "COCO_train2014_000000000005"
    assert seen.pop(hidden) == ["car", "motorcycle"] and annotated.pop(hidden) == ["bicycle", "car", "motorcycle"]
    assert seen == annotated and seen["COCO_train2014_000000000009"] == ["person", "dog", "toothbrush"]
    assert "1 images have a class in their annotations alone" in capsys.readouterr().out


def test_val_part_is_the_head_of_val(made, monkeypatch):
    monkeypatch.setattr(coco, "VAL_PART", 2)
    path = made / "instances_val2014.json"
    content = json.loads(path.read_text())
    for number in (30, 20, 1):
        name = f"COCO_val2014_{number:012d}.jpg"
        content["images"].append({**content["images"][0], "id": number, "file_name": name})
        content["annotations"].append({**content["annotations"][0], "id": number, "image_id": number})
        Image.new("RGB", (WIDTH, HEIGHT)).save(made / "val2014" / name)
    path.write_text(json.dumps(content))
    prepare_coco.main(arguments(made / "out", made, made))
    lists = made / "out/ImageSets/Segmentation"
    assert [int(name[-12:]) for name in (lists / "val.txt").read_text().split()] == [1, 4, 20, 30]
    assert [int(name[-12:]) for name in (lists / "val_part.txt").read_text().split()] == [1, 4]


def test_images_linked_copied_left(made, capsys):
    for how in ("link", "copy", "leave"):
        (made / how / "JPEGImages").mkdir(parents=True) if how == "leave" else None
        prepare_coco.main(arguments(made / how, made, made, "--images", how))
    first = "JPEGImages/train2014/COCO_train2014_000000000003.jpg"
    assert (made / "link" / first).is_symlink() and not (made / "copy" / first).is_symlink()
    assert snapshot(made / "link").keys() == snapshot(made / "copy").keys()
    assert not list((made / "leave/JPEGImages").iterdir())
    before = snapshot(made / "link")
    capsys.readouterr()
    prepare_coco.main(arguments(made / "link", made, made))
    assert "everything is there already" in capsys.readouterr().out and snapshot(made / "link") == before
    (made / "train2014/COCO_train2014_000000000003.jpg").write_bytes(b"other")
    with pytest.raises(UserError, match="COCO_train2014_000000000003.jpg has 5 bytes"):
        prepare_coco.main([str(made / "link"), "--verify"])


@pytest.mark.parametrize(("edit", "words"), [
    (lambda content: content["categories"][0].update(name="tooth brush"),
     ("instances_train2014.json", "'tooth brush'", "'toothbrush'")),
    (lambda content: content["categories"].pop(), ("instances_train2014.json", "'bicycle'", "'person'")),
    (lambda content: content["annotations"][3].update(segmentation=[["a", 1, 2]]),
     ("annotation 4 of COCO_train2014_000000000003",)),
    (lambda content: content["annotations"][2]["segmentation"].update(size=[4, 150]),
     ("annotation 3 of COCO_train2014_000000000009",)),
    (lambda content: content["images"][1].update(height=21), ("COCO_train2014_000000000003.jpg is 30x20", "30x21")),
    (lambda content: content.pop("images"), ("instances_train2014.json", "no images")),
], ids=["renamed class", "dropped class", "polygon", "size of a crowd", "size of an image", "no images"])
def test_broken_annotations_are_named(edit, words, made):
    path = made / "instances_train2014.json"
    content = json.loads(path.read_text())
    edit(content)
    path.write_text(json.dumps(content))
    with pytest.raises(UserError) as error:
        prepare_coco.main(arguments(made / "out", made, made))
    for word in words:
        assert word in str(error.value)


def test_missing_files_are_named(made):
    with pytest.raises(UserError, match="annotations is missing"):
        prepare_coco.main([str(made / "out")])
    with pytest.raises(UserError, match="instances_train2014.json: no such file"):
        prepare_coco.main(arguments(made / "out", made / "train2014", made))
    (made / "train2014/COCO_train2014_000000000003.jpg").unlink()
    with pytest.raises(UserError, match="train2014: 1 annotated images are missing: COCO_train2014_000000000003"):
        prepare_coco.main(arguments(made / "out", made, made))
    (made / "instances_val2014.json").write_text("{")
    with pytest.raises(UserError, match="instances_val2014.json: not a file of COCO"):
        prepare_coco.main(arguments(made / "other", made, made))
