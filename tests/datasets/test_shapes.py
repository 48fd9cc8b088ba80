"""Generated shapes: the same from the same seed, exact masks, finished once, resumed when interrupted."""

import json
import multiprocessing

import cv2
import numpy as np
import pytest
import torch
import torch.nn.functional as F

from datasets import shapes
from engine.config import load_config
from model.multi_scale import resize
from model.pseudo_labels import present_first, refined_labels
from utils.errors import UserError
from utils.images import read_label_map, read_rgb

SETTINGS = {"seed": 3, "train": 6, "val": 3, "size": 64}


def content(root):
    return {str(path.relative_to(root)): path.read_bytes() for path in sorted(root.rglob("*")) if path.is_file()}


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A data set of SETTINGS."""
    root = tmp_path_factory.mktemp("made") / "shapes"
    shapes.generate(root, **SETTINGS)
    return root


def test_same_seed_same_images():
    for split in shapes.SPLITS:
        image, label_map = shapes.draw(5, split, 2, 64)
        np.random.seed(0)
        again, labels_again = shapes.draw(5, split, 2, 64)
        assert (image == again).all() and (label_map == labels_again).all()
    different = [shapes.draw(5, "train", 3, 64), shapes.draw(6, "train", 2, 64), shapes.draw(5, "val", 2, 64)]
    reference = shapes.draw(5, "train", 2, 64)[0]
    assert all((image != reference).any() for image, _ in different)


def test_pictures_are_as_described():
    counts = np.zeros(len(shapes.CLASSES))
    shares = []
    for index in range(60):
        image, label_map = shapes.draw(0, "train", index, 96)
        assert image.shape == (96, 96, 3) and image.dtype == label_map.dtype == np.uint8
        present = np.unique(label_map)
        assert present[0] == 0 and 2 <= len(present) <= 5 and present.max() <= len(shapes.CLASSES)
        counts[present[1:] - 1] += 1
        shares.append((label_map > 0).mean())
    assert len(shapes.CLASSES) >= 6 and counts.min() >= 5
    assert 0.1 < np.mean(shares) < 0.4


def test_borders_are_stronger_than_textures():
    """As on photographs: the steps between neighbouring pixels at a border are several times those of a texture."""
    steps = {"border": [], "inside": []}
    for index in range(40):
        image, label_map = shapes.draw(0, "train", index, 128)
        image, label_map = image.astype(np.float32), label_map.astype(int)
        for axis in (0, 1):
            step = np.abs(np.diff(image, axis=axis)).mean(2)
            border = np.diff(label_map, axis=axis) != 0
            near = cv2.dilate(border.astype(np.uint8), np.ones((5, 5), np.uint8)) > 0
            objects = (label_map[1:] if axis == 0 else label_map[:, 1:]) > 0
            steps["border"].append(step[border])
            steps["inside"].append(step[objects & ~near])
    border, inside = (np.concatenate(values) for values in steps.values())
    assert border.mean() > 4 * inside.mean()
    assert np.median(border) > np.quantile(inside, 0.95)


def test_colour_alone_does_not_tell_the_class():
    """The nearest of the classes' mean colours, learned from 150 images, is right hardly more often than chance."""
    colours, kinds = [], []
    for index in range(300):
        image, label_map = shapes.draw(0, "train", index, 64)
        for kind in np.unique(label_map)[1:]:
            colours.append(image[label_map == kind].mean(0))
            kinds.append(kind)
    colours, kinds, half = np.array(colours), np.array(kinds), len(kinds) // 2
    means = np.array([colours[:half][kinds[:half] == kind].mean(0) for kind in range(1, len(shapes.CLASSES) + 1)])
    nearest = np.linalg.norm(colours[half:, None] - means, axis=2).argmin(1) + 1
    assert (nearest == kinds[half:]).mean() < 1 / len(shapes.CLASSES) + 0.1


def test_refinement_sharpens_a_coarse_map(one_thread):
    """PAR as configs/default.yaml has it brings the mask, known only as shares of 8-pixel patches, nearer to itself."""
    config = load_config().pseudo_labels
    wrong = {0: 0.0, config.par_iterations: 0.0}
    for index in range(20):
        image, label_map = map(torch.from_numpy, shapes.draw(0, "train", index, 80))
        objects = F.one_hot(label_map.long(), len(shapes.CLASSES) + 1).permute(2, 0, 1)[None, 1:].float()
        coarse, present = resize(F.avg_pool2d(objects, 8), label_map.shape), present_first(objects.amax((2, 3)))
        for iterations in wrong:
            given = image.permute(2, 0, 1)[None] / 255, 0.5, 0.5, config.par_dilations, iterations
            refined = refined_labels(present.of(coarse), present, *given)[0]
            wrong[iterations] += (refined != label_map).float().mean().item() / 20
    assert wrong[config.par_iterations] < 0.7 * wrong[0]


def test_written_in_the_voc_layout(made):
    labels = json.loads((made / "labels.json").read_text())
    for split in shapes.SPLITS:
        names = (made / "ImageSets" / "Segmentation" / f"{split}.txt").read_text().split()
        assert len(names) == SETTINGS[split]
        for index, name in enumerate(names):
            image, label_map = shapes.draw(3, split, index, 64)
            written = read_label_map(made / "SegmentationClass" / f"{name}.png", len(shapes.CLASSES) + 1)
            assert (written == label_map).all()
            assert np.abs(read_rgb(made / "JPEGImages" / f"{name}.jpg").astype(int) - image).mean() < 4
            assert labels[name] == [shapes.CLASSES[i - 1] for i in np.unique(label_map) if i]
    assert len(labels) == 9 and not (made / ".generating").exists()


def test_finished_is_left_alone_and_interrupted_is_redone(made, tmp_path, monkeypatch):
    with monkeypatch.context() as patched:
        patched.setattr(shapes, "_write", lambda *_: pytest.fail("written twice"))
        shapes.generate(made, **SETTINGS)

    broken, calls, draw = tmp_path / "broken", [], shapes.draw

    def interrupted(*arguments):
        calls.append(arguments)
        if len(calls) == 5:
            raise KeyboardInterrupt
        return draw(*arguments)

    with monkeypatch.context() as patched:
        patched.setattr(shapes, "draw", interrupted)
        with pytest.raises(KeyboardInterrupt):
            shapes.generate(broken, **SETTINGS)
    assert not (broken / "shapes.json").exists()
    (broken / "JPEGImages" / "train_000001.jpg").write_bytes(b"half")
    shapes.generate(broken, **SETTINGS)
    assert content(broken) == content(made)


def test_two_processes_at_once(made, tmp_path):
    root, context = tmp_path / "shapes", multiprocessing.get_context("fork")
    workers = [context.Process(target=shapes.generate, args=(root,), kwargs=SETTINGS) for _ in range(3)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join(30)
        assert worker.exitcode == 0
    assert content(root) == content(made)


def test_refuses_other_content_and_other_settings(made, tmp_path):
    with pytest.raises(UserError, match="'seed': 3"):
        shapes.generate(made, **(SETTINGS | {"seed": 4}))
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.tex").write_text("precious")
    with pytest.raises(UserError, match=r"thesis\.tex"):
        shapes.generate(tmp_path / "mine", **SETTINGS)
    for change in ({"train": 0}, {"val": 0}, {"size": 8}, {"seed": -1}):
        with pytest.raises(UserError, match=r"data\.shapes"):
            shapes.generate(tmp_path / "new", **(SETTINGS | change))
