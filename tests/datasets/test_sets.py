"""The data sets as the trainer builds them: layouts, items, and every mistake a user makes with the files."""

import json
import logging
import shutil
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image
from pydantic import ValidationError
from torch.utils.data import DataLoader

from datasets import build_train_set, build_val_set, coco, collate_train, voc
from datasets.config import Data
from datasets.labels import labels_of_mask
from utils.errors import UserError
from utils.images import write_label_png


def config_of(folder, **data):
    """What a data set reads of a config."""
    data = Data(**{"root": str(folder), "crop_size": 48, **data})
    return SimpleNamespace(data=data, evaluate=SimpleNamespace(bkg=0.5))


@pytest.fixture
def tiny_coco(tmp_path):
    """Three images in the COCO layout: two of train2014, one of val2014, which is also val_part."""
    root = tmp_path / "coco"
    members = {
        "train": ["COCO_train2014_000000000009", "COCO_train2014_000000000025"],
        "val": ["COCO_val2014_000000000042"],
    }
    labels = {}
    for part, names in members.items():
        for i, name in enumerate(names):
            mask = np.zeros((40, 56), np.uint8)
            mask[5:20, 5:30] = 80 - i
            image = root / "JPEGImages" / f"{part}2014" / f"{name}.jpg"
            image.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(np.full((40, 56, 3), 100, np.uint8)).save(image)
            short = name if part == "train" else name[-12:]
            write_label_png(root / "SegmentationClass" / f"{part}2014" / f"{short}.png", mask)
            labels[name] = [coco.CLASSES[79 - i]]
    (root / "train.txt").write_text("\n".join(members["train"]))
    (root / "SegmentationClass" / "val_part.txt").write_text(members["val"][0])
    (root / "labels.json").write_text(json.dumps(labels))
    return root


def edit_list(root, split, text):
    (root / "ImageSets" / "Segmentation" / f"{split}.txt").write_text(text)


def first_name(root, split):
    return (root / "ImageSets" / "Segmentation" / f"{split}.txt").read_text().split()[0]


def test_items_and_batch(tiny_voc):
    train = build_train_set(config_of(tiny_voc))
    assert train.classes == voc.CLASSES and len(train) == len(train.names) == 8
    name, image, labels, valid, seed, label_map, skipped = train[2, 77]
    assert name == train.names[2] and seed == 77 and label_map is None and not skipped
    assert image.shape == (3, 48, 48) and image.dtype == torch.float32
    assert labels.shape == (20,) and labels.dtype == torch.float32 and valid.dtype == torch.bool
    batch = collate_train([train[i, 2**60 + i] for i in range(3)])
    assert batch.names == train.names[:3] and batch.images.shape == (3, 3, 48, 48) and batch.labels.shape == (3, 20)
    assert batch.valid.shape == (3, 48, 48) and batch.seeds.tolist() == [2**60, 2**60 + 1, 2**60 + 2]


def test_val_items_agree_with_their_masks(tiny_voc):
    val = build_val_set(config_of(tiny_voc))
    assert len(val) == 4 and len(build_val_set(config_of(tiny_voc), "train")) == 8
    for i in range(len(val)):
        item = val[i]
        assert item.name == val.names[i] and item.label_map.dtype == np.uint8
        assert item.image.shape[1:] == item.label_map.shape
        assert torch.equal(item.labels, labels_of_mask(item.label_map, 20))


@pytest.mark.parametrize("augmentation", ["resized_crop", "scale_and_pad", "scale_flip_crop"])
def test_augmentation_does_not_depend_on_workers(tiny_voc, augmentation):
    train = build_train_set(config_of(tiny_voc, augmentation=augmentation))
    keys = [(i % 8, 1000 + i) for i in range(10)]
    batches = []
    for workers in (0, 1, 2):
        torch.manual_seed(workers)
        loader = DataLoader(train, 2, sampler=keys, num_workers=workers, collate_fn=collate_train)
        batches.append(list(loader))
    for other in batches[1:]:
        for a, b in zip(batches[0], other, strict=True):
            assert a.names == b.names and a.most_classes == b.most_classes and a.boxes == b.boxes
            assert all(torch.equal(x, y) for x, y in zip(a[1:5], b[1:5], strict=True))


def test_training_needs_no_masks(tiny_voc):
    for mask in (tiny_voc / "SegmentationClassAug").iterdir():
        mask.unlink()
    assert len(build_train_set(config_of(tiny_voc))) == 8
    with pytest.raises(UserError, match=r"\.png: mask of .*val\.txt is missing"):
        build_val_set(config_of(tiny_voc))
    (tiny_voc / "SegmentationClassAug").rmdir()
    assert len(build_train_set(config_of(tiny_voc))) == 8
    with pytest.raises(UserError, match="neither SegmentationClassAug nor SegmentationClass"):
        build_val_set(config_of(tiny_voc))


def truncate(root, *numbers):
    for number in numbers:
        path = root / "JPEGImages" / f"tiny_{number:03d}.jpg"
        path.write_bytes(path.read_bytes()[:500])


def test_the_next_image_takes_the_place_of_one_that_cannot_be_read(tiny_voc):
    """With the same seed, whatever process or worker asks; of a mask of another size and of an unknown id, too."""
    before, train = (build_train_set(config_of(tiny_voc, masks="own", on_error=what)) for what in ("raise", "skip"))
    expected = [before[number, 70 + number] for number in (4, 6, 0, 0)]
    truncate(tiny_voc, 2, 7)
    write_label_png(tiny_voc / "SegmentationClassAug" / "tiny_003.png", np.zeros((9, 11)))
    write_label_png(tiny_voc / "SegmentationClassAug" / "tiny_005.png", np.full((68, 64), 33))
    loaders = [DataLoader(train, 4, sampler=[(2, 74), (5, 76), (7, 70), (0, 70)], num_workers=workers,
                          collate_fn=collate_train) for workers in (0, 2)]
    for batch in (next(iter(loader)) for loader in loaders):
        assert batch.names == [item.name for item in expected] and batch.seeds.tolist() == [74, 76, 70, 70]
        for ours, field in ((batch.images, "image"), (batch.masks, "label_map"), (batch.labels, "labels")):
            assert torch.equal(ours, torch.stack([getattr(item, field) for item in expected]))
        names, reasons = zip(*batch.to(torch.device("cpu")).skipped, strict=True)
        assert names == ("tiny_002", "tiny_003", "tiny_005", "tiny_007")
        assert all(f"{name}." in reason for name, reason in zip(names, reasons, strict=True))
    with pytest.raises(UserError, match=r"tiny_002\.jpg: image file cannot be read"):
        before[2, 74]
    truncate(tiny_voc, 8)
    with pytest.raises(UserError, match=r"tiny_008\.jpg"):
        build_val_set(config_of(tiny_voc, on_error="skip"))[0]   # an evaluation never skips


@pytest.mark.parametrize(("limit", "broken", "words"), [
    (1, (2, 3), r"2 training images .*max_errors\): tiny_002, tiny_003; the first: .*tiny_002\.jpg"),
    (10, range(8), "8 training images cannot be read, too many .* and 3 more"),
])
def test_no_search_without_end(tiny_voc, limit, broken, words):
    truncate(tiny_voc, *broken)
    with pytest.raises(UserError, match=words):
        build_train_set(config_of(tiny_voc, on_error="skip", max_errors=limit))[2, 0]


def test_labels_from_masks(tiny_voc):
    with_file, from_masks = (build_train_set(config_of(tiny_voc, image_labels=source)) for source in (None, "masks"))
    assert all(torch.equal(with_file[i, 0].labels, from_masks[i, 0].labels) for i in range(8))


@pytest.mark.parametrize(("drawn", "first", "refused"), [
    (lambda ids, one: np.where(ids, 255, 0), "tiny_008.png: ids [0, 255], labels ['aeroplane']; so 4 of 4 masks", True),
    (lambda ids, one: ids.clip(1) - 1, "tiny_008.png: ids [0], labels ['aeroplane']; so 4 of 4 masks", True),
    (lambda ids, one: ids * (1 - one), "note: 1 of 4 masks hold other classes than the labels: tiny_008", False),
    (lambda ids, one: ids + 4 * one, "note: 1 of 4 masks hold other classes than the labels: tiny_008", False),
])
def test_masks_that_do_not_show_what_the_labels_say(tiny_voc, caplog, monkeypatch, drawn, first, refused):
    monkeypatch.setattr(logging.getLogger("wsss"), "propagate", True)
    for path in (tiny_voc / "SegmentationClassAug").iterdir():
        Image.fromarray(drawn(np.array(Image.open(path)), path.stem == "tiny_008").astype(np.uint8)).save(path)
    with pytest.raises(UserError) if refused else nullcontext() as error:
        build_val_set(config_of(tiny_voc))
    assert first in (str(error.value) if refused else caplog.text)


def test_list_forms(tiny_voc):
    names = (tiny_voc / "ImageSets/Segmentation/val.txt").read_text().split()
    pairs = "\n".join(f"/JPEGImages/{name}.jpg /SegmentationClassAug/{name}.png" for name in names)
    edit_list(tiny_voc, "pairs", "\ufeff" + pairs + "\n\n")
    (tiny_voc / "plain.txt").write_bytes(" \r\r".join(names).encode("utf-16"))
    by_path = str(tiny_voc / "plain.txt")
    for split in ("pairs", "plain", by_path, "plain.txt"):
        assert build_val_set(config_of(tiny_voc), split).names == names


def test_one_line_split(tiny_voc):
    name = first_name(tiny_voc, "val")
    for text in (name, name + "\n"):
        edit_list(tiny_voc, "one", text)
        assert build_val_set(config_of(tiny_voc), "one").names == [name]
        assert build_train_set(config_of(tiny_voc, train_split="one"))[0, 1].name == name


@pytest.mark.parametrize(("text", "words"), [
    ("tiny_008\ntiny_009\ntiny_008\n", "names image 'tiny_008' twice"),
    ("/JPEGImages/p/tiny_008.png\n/JPEGImages/q/tiny_008.png", r"twice, .*p/tiny_008\.png and .*q/tiny_008\.png"),
    ("tiny_008\n/JPEGImages/p/tiny_008.png", r"twice, .*JPEGImages/tiny_008\.jpg and .*p/tiny_008\.png"),
    ("tiny_008 1", "'tiny_008 1': expected one name, or"),
    ("Stra\udcdfe", "save it as UTF-8"),
    ("\n \r", "the split is empty"),
])
def test_lines_of_a_list(tiny_voc, text, words):
    for folder in ("p", "q"):
        shutil.copytree(tiny_voc / "SegmentationClassAug", tiny_voc / "JPEGImages" / folder)
    (tiny_voc / "own.txt").write_bytes(text.encode(errors="surrogateescape"))
    with pytest.raises(UserError, match=rf"own\.txt: .*{words}"):
        build_train_set(config_of(tiny_voc, train_split="own"))


@pytest.mark.parametrize(("first", "last", "encoding", "words"), [
    ("background\n", "", "utf-8-sig", None),
    ("Background\n", "", "utf-16", None),
    ("0: bg\r", "\r\n", "utf-8", None),
    ("__ignore__\n_background_\n", "", "utf-8", None),
    ("", "\nBACKGROUND", "utf-8", "'BACKGROUND' is no class"),
    ("# mine\n", "", "utf-8", "'# mine' is no class"),
    ("names:\n", "", "utf-8", "'names:' is no class"),
    ("- ", "", "utf-8", "'- aeroplane' is no class"),
    ("1,", "", "utf-8", "'1,aeroplane' is no class"),
    ("", "\nTV Monitor", "utf-8", "all different, not 'tvmonitor' and 'TV Monitor'"),
    ("", "\nStra\xdfe", "latin-1", "save it as UTF-8"),
    ("", "", "utf-16-le", "save it as UTF-8"),
])
def test_classes_txt(tiny_voc, first, last, encoding, words):
    (tiny_voc / "classes.txt").write_bytes((first + "\n".join(voc.CLASSES) + last).encode(encoding))
    if words is None:
        assert build_train_set(config_of(tiny_voc)).classes == voc.CLASSES
    else:
        with pytest.raises(UserError, match=rf"classes\.txt: .*{words}"):
            build_train_set(config_of(tiny_voc))


@pytest.mark.parametrize(("spoil", "split", "words"), [
    (lambda image, mask: image.unlink(), "train_aug", r"{}\.jpg: image of .*train_aug\.txt is missing"),
    (lambda image, mask: image.write_bytes(image.read_bytes()[:500]), "train_aug", r"{}\.jpg"),
    (lambda image, mask: (image.parents[1] / "labels.json").write_text("{}"), "train_aug", "no labels for image {}"),
    (lambda image, mask: write_label_png(mask, np.zeros((10, 11))), "val", r"{0}\.png is 11x10, .*{0}\.jpg is 64x"),
    (lambda image, mask: write_label_png(mask, np.full((10, 11), 33)), "val", r"{}\.png: mask holds id 33"),
])
def test_files_that_are_wrong(tiny_voc, spoil, split, words):
    name = first_name(tiny_voc, split)
    spoil(tiny_voc / "JPEGImages" / f"{name}.jpg", tiny_voc / "SegmentationClassAug" / f"{name}.png")
    with pytest.raises(UserError, match=words.format(name)):
        build_train_set(config_of(tiny_voc))[0, 0] if split != "val" else build_val_set(config_of(tiny_voc))[0]


def test_image_of_no_class_is_allowed(tiny_voc):
    labels = json.loads((tiny_voc / "labels.json").read_text())
    (tiny_voc / "labels.json").write_text(json.dumps({**labels, first_name(tiny_voc, "train_aug"): []}))
    assert build_train_set(config_of(tiny_voc))[0, 0].labels.sum() == 0
    (tiny_voc / "labels.json").write_text(json.dumps({name: [] for name in labels}))
    with pytest.raises(UserError, match=r"labels\.json: none of the 8 images has a class"):
        build_train_set(config_of(tiny_voc))


def test_own_classes(tiny_voc):
    classes = ["aeroplane", "bird", "cat", "dog", "yak"]
    assert build_train_set(config_of(tiny_voc, classes=classes))[0, 0].labels.shape == (5,)
    with pytest.raises(UserError, match="unknown class"):
        build_train_set(config_of(tiny_voc, classes=["bird", "yak"]))


def test_root(tiny_voc, tmp_path, monkeypatch):
    monkeypatch.delenv("VOC_ROOT", raising=False)
    config = config_of(tiny_voc, root=None)
    with pytest.raises(UserError, match=r"data\.root=.*VOC_ROOT="):
        build_train_set(config)
    monkeypatch.setenv("VOC_ROOT", str(tiny_voc))
    assert len(build_train_set(config)) == 8
    with pytest.raises(UserError, match="nowhere: no such folder"):
        build_train_set(config_of(tmp_path / "nowhere"))
    (tmp_path / "ImageSets" / "Segmentation").mkdir(parents=True)
    (tmp_path / "train_aug.txt").write_text("x")
    with pytest.raises(UserError, match="JPEGImages: no such folder"):
        build_train_set(config_of(tmp_path))
    with pytest.raises(ValidationError, match="name"):
        config_of(tiny_voc, name="cocoa")


def test_coco_layout(tiny_coco):
    settings = {"augmentation": "scale_and_pad", "train_split": "train", "val_split": "val_part"}
    config = config_of(tiny_coco, name="coco", **settings)
    train, val = build_train_set(config), build_val_set(config)
    assert len(train.classes) == 80 and train.names[0] == "COCO_train2014_000000000009"
    assert train[1, 0].labels.argmax() == 78 and not train[1, 0].valid.all()
    assert val.names == ["COCO_val2014_000000000042"] and set(val[0].label_map.flat) == {0, 80}
    assert torch.equal(val[0].labels, labels_of_mask(val[0].label_map, 80))
    from_masks = config_of(tiny_coco, name="coco", image_labels="masks", **settings)
    assert build_train_set(from_masks)[0, 0].labels.nonzero().tolist() == [[79]]


def test_coco_mistakes(tiny_coco):
    config = config_of(tiny_coco, name="coco", train_split="train", val_split="val_part")
    (tiny_coco / "SegmentationClass" / "val2014" / "000000000042.png").unlink()
    with pytest.raises(UserError, match=r"COCO_val2014_000000000042\.png: mask of .*val_part\.txt is missing"):
        build_val_set(config)
    (tiny_coco / "JPEGImages" / "train2014" / "COCO_train2014_000000000025.jpg").unlink()
    with pytest.raises(UserError, match=r"COCO_train2014_000000000025\.jpg: image of .*train\.txt is missing"):
        build_train_set(config)
    (tiny_coco / "train.txt").write_text("2007_000032")
    with pytest.raises(UserError, match=r"train\.txt: '2007_000032' is no COCO image name"):
        build_train_set(config)


def test_shapes_by_config(tmp_path):
    sizes = {"seed": 1, "train": 4, "val": 2, "size": 64}
    config = config_of(tmp_path / "shapes", name="shapes", train_split="train", shapes=sizes)
    train, val = build_train_set(config), build_val_set(config)
    assert len(train) == 4 and len(val) == 2 and len(train.classes) == 6
    assert all(torch.equal(item.labels, labels_of_mask(item.label_map, 6)) for item in (val[0], val[1]))


def test_real_voc_images(shared_data):
    root = shared_data / "voc_animals"
    if not root.is_dir():
        pytest.skip(f"no {root}")
    train, val = build_train_set(config_of(root)), build_val_set(config_of(root))
    assert len(train) > len(val) > 0
    for i in range(0, len(val), max(1, len(val) // 8)):
        item = val[i]
        assert torch.equal(item.labels, labels_of_mask(item.label_map, 20))
    image = train[0, 0].image
    assert image.shape == (3, 48, 48) and image.std() > 0.1


def test_real_coco_images(shared_data, tmp_path):
    root = shared_data / "coco_mini"
    if not root.is_dir():
        pytest.skip(f"no {root}")
    names = {}
    for part in ("train", "val"):
        content = json.loads((root / "annotations" / f"instances_{part}2014.json").read_text())
        classes = {c["id"]: c["name"] for c in content["categories"]}
        stems = {image["id"]: Path(image["file_name"]).stem for image in content["images"]}
        names |= {stem: [] for stem in stems.values()}
        for annotation in content["annotations"]:
            names[stems[annotation["image_id"]]].append(classes[annotation["category_id"]])
    (tmp_path / "all.txt").write_text("\n".join(names))
    (tmp_path / "labels.json").write_text(json.dumps(names))
    config = config_of(root, name="coco", augmentation="scale_and_pad", train_split=str(tmp_path / "all.txt"))
    train = build_train_set(config)
    assert train.names == list(names)
    for i in range(0, len(train), max(1, len(train) // 6)):
        item = train[i, i]
        assert {train.classes[k] for k in item.labels.nonzero().flatten()} == set(names[item.name])


def test_the_folders_own_classes_come_before_the_data_sets(tiny_voc):
    (tiny_voc / "classes.txt").write_text("nut\nbolt\n")
    (tiny_voc / "labels.json").write_text(json.dumps({f"tiny_{i:03d}": ["bolt"] for i in range(12)}))
    train_set = build_train_set(config_of(tiny_voc))
    assert train_set.classes == ("nut", "bolt") and train_set[0, 0].labels.tolist() == [0, 1]
    with pytest.raises(UserError, match="unknown class 'bolt'"):
        build_train_set(config_of(tiny_voc, classes=["screw"]))


def test_a_split_that_is_not_there_is_told_which_are(tiny_voc):
    with pytest.raises(UserError, match="split 'trian' not found: .*; there are train, train_aug, val$"):
        build_train_set(config_of(tiny_voc, train_split="trian"))
