"""A user's mistake: exit code 2 and one line that names the culprit, from the launchers themselves."""

import socket

import numpy as np
import pytest
from PIL import Image

from tests import tiny


def assert_one_line(done, *words):
    assert done.returncode == 2, done.stderr
    lines = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    assert len(lines) == 1, done.stderr
    assert "Traceback" not in done.stderr and "Traceback" not in done.stdout
    for word in words:
        assert str(word) in lines[0]


def mask(root):
    return root / "SegmentationClassAug" / "tiny_009.png"


def break_missing_image(root):
    (root / "JPEGImages" / "tiny_003.jpg").unlink()
    return "tiny_003.jpg"


def break_missing_mask(root):
    mask(root).unlink()
    return "tiny_009"


def break_truncated_image(root):
    path = root / "JPEGImages" / "tiny_003.jpg"
    path.write_bytes(path.read_bytes()[:400])
    return "tiny_003.jpg"


def break_mask_id(root):
    ids = np.array(Image.open(mask(root)))
    ids[0, 0] = 77
    Image.fromarray(ids).save(mask(root))
    return "tiny_009.png: mask holds id 77"


def break_mask_size(root):
    Image.fromarray(np.zeros((10, 12), np.uint8)).save(mask(root))
    return "tiny_009.png"


def break_empty_split(root):
    path = root / "ImageSets" / "Segmentation" / "train_aug.txt"
    path.write_text("")
    return "train_aug.txt"


def break_image_without_label(root):
    path = root / "labels.json"
    path.write_text(path.read_text().replace("tiny_002", "tiny_999"))
    return "tiny_002"


@pytest.mark.parametrize("fault", [
    break_missing_image, break_missing_mask, break_truncated_image, break_mask_id, break_mask_size, break_empty_split,
    break_image_without_label,
])
def test_data(tiny_voc, tmp_path, fault):
    culprit = fault(tiny_voc)
    done = tiny.train_alone(tiny_voc, tmp_path / "runs", "train.iterations=2", "train.validate_every=1")
    assert_one_line(done, culprit)


def test_a_truncated_image_in_a_worker(tiny_voc, tmp_path):
    culprit = break_truncated_image(tiny_voc)
    done = tiny.train(tiny_voc, tmp_path / "runs", "train.iterations=2", "data.workers=1", count=2)
    assert_one_line(done, culprit)


def test_a_split_of_one_line_is_none(tiny_voc, tmp_path):
    for split in ("train_aug", "val"):
        path = tiny_voc / "ImageSets" / "Segmentation" / f"{split}.txt"
        path.write_text(path.read_text().splitlines()[0])
    done = tiny.train_alone(tiny_voc, tmp_path / "runs", "train.iterations=2")
    assert done.returncode == 0, done.stderr
    assert "1 training images" in done.stdout


@pytest.mark.parametrize("override, words", [
    ("train.iteration=5", ("train.iteration", "train.iterations")),
    ("train.iterations=many", ("train.iterations", "many")),
    ("train.batch_size=0", ("train.batch_size",)),
    ("model.backbone=resnet50", ("model.backbone=resnet50",)),
    ("model.weights=nowhere.pth", ("nowhere.pth",)),
    ("model.weights=null", ("model.weights",)),
    ("data.root=nowhere", ("nowhere",)),
    ("tag=config=more_shapes", ("TAG", "config=more_shapes")),
], ids=lambda value: value if isinstance(value, str) else "")
def test_config(tiny_voc, tmp_path, override, words):
    train = tiny.train if "iteration=" in override else tiny.train_alone
    assert_one_line(train(tiny_voc, tmp_path / "runs", override), *words)


def test_start_weights_that_cannot_be_fetched(tiny_voc, tmp_path, monkeypatch):
    monkeypatch.setenv("WSSS_OFFLINE", "1")
    monkeypatch.setenv("WSSS_DOWNLOADS", str(tmp_path / "downloads"))
    done = tiny.train_alone(tiny_voc, tmp_path / "runs", "model.weights=vit_base_imagenet", count=2)
    assert_one_line(done, "vit_base_imagenet", "offline", "jx_vit_base_p16_224-80ecf9dd.pth", tmp_path / "downloads")


def test_a_batch_that_cannot_be_shared(tiny_voc, tmp_path):
    done = tiny.train_alone(tiny_voc, tmp_path / "runs", "train.batch_size=3", count=2)
    assert_one_line(done, "train.batch_size=3", "2")


def test_class_count_of_the_checkpoint(tiny_voc, tmp_path):
    done = tiny.train_alone(tiny_voc, tmp_path / "runs", "train.iterations=1")
    assert done.returncode == 0, done.stderr
    weights = tiny.last_weights(tmp_path / "runs" / "tiny", 1)
    classes = "data.classes=[" + ",".join(f"c{i}" for i in range(25)) + "]"
    done = tiny.fork("tools/infer_voc.py", weights, classes, "data.image_labels=masks")
    assert_one_line(done, "20", "25")


def test_devices_that_do_not_exist(tiny_voc, tmp_path):
    done = tiny.bash("run_train.sh", "scripts/train_voc.py", "90,91", 2, "auto", "tiny")
    assert_one_line(done, "90")


def test_a_port_in_use(tiny_voc, tmp_path):
    with socket.socket() as taken:
        taken.bind(("", 0))
        taken.listen()
        port = taken.getsockname()[1]
        assert_one_line(tiny.bash("run_train.sh", "scripts/train_voc.py", "cpu", 1, port, "tiny"), port)
