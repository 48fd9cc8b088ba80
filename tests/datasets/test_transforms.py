"""Training augmentations: sizes, ranges, the valid mask, and draws that come from the seed alone."""

import numpy as np
import pytest
import torch
from PIL import Image
from pydantic import ValidationError
from torchvision.transforms import ColorJitter, RandomApply

from datasets.config import Data
from datasets.sets import TrainItem, collate_train
from datasets.transforms import build_augmentation, seeded
from utils.batch import boxes_of
from utils.images import MEAN, STD, normalize

NAMES = ["resized_crop", "scale_and_pad", "scale_flip_crop", "long_side_crop", "scale_crop"]


def augmentation(name, crop_size=64, resize_range=(0.32, 1.0)):
    return build_augmentation(Data(augmentation=name, crop_size=crop_size, resize_range=resize_range))


def picture(height, width):
    return np.random.default_rng(0).integers(0, 256, (height, width, 3), dtype=np.uint8)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("size", [(50, 70), (64, 64), (200, 90), (1, 1), (300, 20)])
def test_sizes_and_types(name, size):
    for seed in range(8):
        with seeded(seed):
            crop, valid, _ = augmentation(name)(picture(*size))
        assert crop.shape == (3, 64, 64) and crop.dtype == torch.float32 and torch.isfinite(crop).all()
        assert valid.shape == (64, 64) and valid.dtype == torch.bool
        assert valid.any() and (name != "resized_crop" or valid.all())


@pytest.mark.parametrize("name", NAMES)
def test_draws_come_from_the_seed(name):
    transform, image = augmentation(name), picture(90, 120)
    crops = []
    for state in (1, 2):
        torch.manual_seed(state)
        np.random.seed(state)
        with seeded(7):
            crops.append(transform(image))
    assert torch.equal(crops[0][0], crops[1][0]) and torch.equal(crops[0][1], crops[1][1])
    with seeded(8):
        assert not torch.equal(transform(image)[0], crops[0][0])


def test_the_generator_is_put_back():
    torch.manual_seed(3)
    expected = torch.rand(4)
    torch.manual_seed(3)
    with seeded(9):
        torch.rand(100)
    assert torch.equal(torch.rand(4), expected)


def test_coco_padding_is_black_and_marked():
    """Half of 61 x 101 pixels is 30 x 50."""
    transform, image = augmentation("scale_and_pad", 64, (0.5, 0.5)), np.full((61, 101, 3), 250, np.uint8)
    black, tops = -torch.tensor(MEAN) / torch.tensor(STD), set()
    for seed in range(20):
        with seeded(seed):
            crop, valid, _ = transform(image)
        torch.testing.assert_close(crop[:, ~valid], black[:, None].expand(3, 64 * 64 - 30 * 50))
        rows, columns = valid.any(1).nonzero().flatten(), valid.any(0).nonzero().flatten()
        assert len(rows) == 30 and rows[-1] - rows[0] == 29 and len(columns) == 50 and columns[-1] - columns[0] == 49
        tops.add(int(rows[0]))
    assert len(tops) > 5 and min(tops) >= 0


def test_coco_crops_where_the_image_is_larger():
    image = picture(80, 64)
    transform = augmentation("scale_and_pad", 64, (1.0, 1.0))
    transform.jitter = transform.flip = lambda picture: picture
    starts = set()
    for seed in range(30):
        with seeded(seed):
            crop, valid, _ = transform(image)
        found = [top for top in range(17) if torch.equal(crop, normalize(image[top : top + 64]))]
        assert valid.all() and len(found) == 1
        starts.add(found[0])
    assert len(starts) > 5


@pytest.mark.parametrize("size", [(40, 90), (130, 30), (64, 64)])
@pytest.mark.parametrize(("name", "range_"), [
    ("scale_and_pad", (0.32, 1.0)), ("scale_flip_crop", (0.5, 2.0)), ("scale_crop", (0.5, 2.0)),
])
def test_the_same_seed_gives_the_same_crop_for_ever(name, range_, size):
    """A seed's draws in their order: colours on COCO, factor, flip, place of the rows and of the columns."""
    image, transform = Image.fromarray(picture(*size)), augmentation(name, 64, range_)
    colours = RandomApply([ColorJitter(0.4, 0.4, 0.2, 0.1)], 0.8) if name == "scale_and_pad" else lambda same: same
    for seed in range(12):
        with seeded(seed):
            slow, factor = colours(image), float(torch.empty(()).uniform_(*range_))
            height, width = (int(side * factor) for side in size)
            slow = np.asarray(slow.resize((width, height), Image.BILINEAR))
            slow = slow[:, ::-1] if torch.rand(1) < 0.5 else slow
            y, x = (int(torch.randint(abs(side - 64) + 1, ())) for side in (height, width))
        crop, there = np.zeros((64, 64, 3), np.uint8), np.zeros((64, 64), bool)
        for i in range(min(height, 64)):
            for j in range(min(width, 64)):
                target = i + y * (height <= 64), j + x * (width <= 64)
                crop[target], there[target] = slow[i + y * (height > 64), j + x * (width > 64)], True
        with seeded(seed):
            ours, valid, _ = transform(np.asarray(image))
        expected = normalize(crop) * (torch.from_numpy(there) if name == "scale_crop" else 1)   # else padded with black
        assert torch.equal(ours, expected) and np.array_equal(valid, there)


@pytest.mark.parametrize("size", [(33, 100), (70, 41), (25, 25), (1, 60)])
def test_the_long_side_is_a_random_share_of_the_crop(size):
    """Of a crop of 23: 20.7 to 26.3, so 20 to 26. Not rounded to grey values, mirrored, padded with the mean colour."""
    image, transform = picture(*size), augmentation("long_side_crop", 23, (0.9, 1 / 0.875))
    exact, long_sides = normalize(image).double(), set()
    for seed in range(60):
        with seeded(seed):
            long_sides.add(long_side := int(torch.randint(20, 27, ())))
            height, width = (max(1, round(side * long_side / max(size))) for side in size)
            slow = torch.nn.functional.interpolate(exact[None], (height, width), mode="bilinear")[0]
            slow = slow.flip(2) if torch.rand(1) < 0.5 else slow
            y, x = (int(torch.randint(abs(side - 23) + 1, ())) for side in (height, width))
        crop, there = torch.zeros(3, 23, 23), torch.zeros(23, 23, dtype=bool)
        for i, j in np.ndindex(min(height, 23), min(width, 23)):
            target = i + y * (height <= 23), j + x * (width <= 23)
            crop[(..., *target)], there[target] = slow[:, i + y * (height > 23), j + x * (width > 23)], True
        with seeded(seed):
            ours, valid, _ = transform(image)
        torch.testing.assert_close(ours, crop, rtol=0, atol=1e-5)
        assert torch.equal(valid, there)
    assert long_sides == {*range(20, 27)}


def without_jitter(transform):
    if hasattr(transform, "transform"):
        transform.transform.transforms.pop()
    transform.jitter = lambda picture: picture
    return transform


@pytest.mark.parametrize("name", NAMES)
def test_a_label_map_changes_nothing_about_the_image(name):
    """Not the crop, nor what is drawn next."""
    transform, image, ids = augmentation(name), picture(90, 120), np.zeros((90, 120), np.uint8)
    for seed in range(10):
        found = []
        for label_map in (None, ids):
            with seeded(seed):
                found.append((*transform(image, label_map)[:2], torch.rand(3)))
        assert all(torch.equal(one, other) for one, other in zip(*found, strict=True))


@pytest.mark.parametrize(("name", "range_"), [
    ("resized_crop", (0.32, 1.0)), ("resized_crop", (0.05, 0.3)), ("scale_and_pad", (0.4, 1.9)),
    ("scale_flip_crop", (0.5, 0.5)), ("scale_flip_crop", (0.5, 2.0)), ("long_side_crop", (0.4, 2.0)),
    ("scale_crop", (0.5, 2.0)),
])
def test_the_label_map_goes_where_the_image_goes(name, range_):
    """Colours say where a pixel of the crop is from, to 1/4 of a pixel: its id is that of the pixel there."""
    y, x = np.mgrid[:46, :60]
    image = np.stack([4 * x + 2, 4 * y + 2, 0 * x], -1).astype(np.uint8)   # 4 times the place, as of pixels' centres
    ids = (1 + x // 5 % 4 + 4 * (y // 5 % 4)).astype(np.uint8)
    transform, checked = without_jitter(augmentation(name, 50, range_)), 0
    for seed in range(60):
        with seeded(seed):
            crop, valid, label_map = transform(image, ids)
        assert label_map.dtype == torch.uint8 and label_map.shape == (50, 50)
        assert (label_map[~valid] == 255).all() and (label_map[valid] <= 16).all()
        places = (crop.numpy() * np.array(STD)[:, None, None] + np.array(MEAN)[:, None, None]) * 255 / 4
        known = valid.numpy().copy()
        for axis, side in enumerate((46, 60)):
            place = places[1 - axis]   # filters are cut off at the image's ends and the crop's
            known &= (place > 3) & (place < side - 3) & (np.abs((place + 2.5) % 5 - 2.5) > 0.25)
        known[:6] = known[-6:] = known[:, :6] = known[:, -6:] = False
        expected = ids[tuple(np.floor(places[1::-1]).astype(int).clip(0, [[[45]], [[59]]]))]
        assert np.array_equal(label_map.numpy()[known], expected[known]), seed
        checked += known.sum()
    assert checked > 60 * 300


def test_boxes():
    valid = torch.zeros(4, 6, 9, dtype=torch.bool)
    valid[0], valid[1, 2:5, 3:9], valid[2, 0, 8] = True, True, True
    assert boxes_of(valid) == [(0, 6, 0, 9), (2, 5, 3, 9), (0, 1, 8, 9), (0, 0, 0, 0)]
    labels, image = torch.ones(2), torch.zeros(3, 6, 9)
    batch = collate_train([TrainItem("a", image, labels, mask, 0) for mask in valid]).to(torch.device("cpu"))
    assert batch.boxes == boxes_of(valid) and batch.masks is None


def test_voc_crop_covers_the_range_of_areas():
    """The crop's area share of a 100 x 100 image, seen through a horizontal ramp, stays within the range."""
    ramp = np.repeat(np.linspace(0, 255, 100).astype(np.uint8)[None, :, None], 100, 0).repeat(3, 2)
    transform = augmentation("resized_crop", 50, (0.32, 1.0))
    transform.transform.transforms.pop()  # without colour jitter the ramp's span is the crop's width
    spans = []
    for seed in range(60):
        with seeded(seed):
            crop, _, _ = transform(ramp)
        values = crop[0] * 0.229 + 0.485
        spans.append(float(values.max() - values.min()))
    assert 0.45 < min(spans) < 0.75 and max(spans) > 0.9


@pytest.mark.parametrize("change", [{"augmentation": "vox"}, {"crop_size": 0}, {"resize_range": [1.0, 0.5]}])
def test_bad_settings(change):
    with pytest.raises(ValidationError, match=next(iter(change))):
        Data(**change)
