"""Training augmentations (MoRe, AFA, ACR and DeepLab, released code): image -> normalised crop and where it has pixels.

A label map goes through the same crop, flip and scale by nearest neighbour, and changes nothing about the image's crop.
Every random number comes from torch's default generator, which `seeded` sets for one sample and restores after.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import cv2
import numpy as np
import torch
from PIL import Image
from torchvision import transforms
from torchvision.transforms import InterpolationMode
from torchvision.transforms import functional as F

from datasets.config import Data
from utils.images import IGNORE, normalize

BLACK = normalize(np.zeros((1, 1, 3), np.uint8))   # (3, 1, 1)
JITTER = {"brightness": 0.4, "contrast": 0.4, "saturation": 0.2, "hue": 0.1}
Augmented = tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]   # crop, valid, label map


@contextmanager
def seeded(seed: int) -> Iterator[None]:
    """Draws of torch's CPU generator inside depend on `seed` alone; the generator's state is put back after."""
    state = torch.get_rng_state()
    # not torch.manual_seed: that would also reseed the GPU
    torch.default_generator.manual_seed(seed)
    try:
        yield
    finally:
        torch.set_rng_state(state)


class ResizedCrop:
    """RandomResizedCrop (bicubic), flip, ColorJitter with probability 0.5."""

    def __init__(self, crop_size: int, resize_range: tuple[float, float]):
        crop = transforms.RandomResizedCrop(crop_size, resize_range, interpolation=InterpolationMode.NEAREST)
        self.of_ids = transforms.Compose([crop, transforms.RandomHorizontalFlip()])
        self.transform = transforms.Compose(
            [
                transforms.RandomResizedCrop(crop_size, resize_range, interpolation=InterpolationMode.BICUBIC),
                transforms.RandomHorizontalFlip(),
                transforms.RandomApply([transforms.ColorJitter(**JITTER)], p=0.5),
            ]
        )

    def __call__(self, image: np.ndarray, label_map: np.ndarray | None = None) -> Augmented:
        """RGB uint8 (H, W, 3) and ids uint8 (H, W) -> normalised float32 (3, S, S), valid bool (S, S), all True, and
        ids uint8 (S, S)."""
        before = torch.get_rng_state()
        crop = normalize(np.asarray(self.transform(Image.fromarray(image))))
        valid = torch.ones(crop.shape[1:], dtype=torch.bool)
        if label_map is None:
            return crop, valid, None
        after = torch.get_rng_state()
        torch.set_rng_state(before)   # the first draws again: crop and flip
        ids = torch.from_numpy(np.array(self.of_ids(Image.fromarray(label_map))))
        torch.set_rng_state(after)
        return crop, valid, ids


class ScaleFlipCrop:
    """Resize by a uniform factor (bilinear), flip, pad with black and crop at random places."""

    padding = BLACK

    def __init__(self, crop_size: int, resize_range: tuple[float, float]):
        self.crop_size, self.resize_range = crop_size, resize_range
        self.jitter = transforms.Compose([])
        self.flip = transforms.RandomHorizontalFlip()

    def __call__(self, image: np.ndarray, label_map: np.ndarray | None = None) -> Augmented:
        """RGB uint8 (H, W, 3) and ids uint8 (H, W) -> normalised float32 (3, S, S), valid bool (S, S), False in the
        padding, and ids uint8 (S, S), 255 there."""
        layers = normalize(self._resized(image))
        if label_map is not None:   # as a fourth channel
            ids = Image.fromarray(label_map).resize(layers.shape[:0:-1], Image.Resampling.NEAREST)   # as of centres
            layers = torch.cat([layers, torch.from_numpy(np.array(ids, np.float32))[None]])
        layers, valid = self._pad_or_crop(self.flip(layers))
        return layers[:3], valid, None if label_map is None else layers[3].byte()

    def _resized(self, image: np.ndarray) -> np.ndarray:
        """RGB uint8 (H, W, 3) -> RGB 0..255 (h, w, 3)."""
        picture = self.jitter(Image.fromarray(image))
        factor = torch.empty(()).uniform_(*self.resize_range).item()
        size = [max(1, int(side * factor)) for side in image.shape[:2]]
        return np.asarray(F.resize(picture, size, InterpolationMode.BILINEAR))

    def _pad_or_crop(self, image: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """(C, h, w) -> (C, S, S) and valid (S, S): a random window of a long side, a random place of a short one."""
        padding = torch.cat([self.padding, torch.full((1, 1, 1), float(IGNORE))])[: len(image)]
        crop = padding.expand(-1, self.crop_size, self.crop_size).clone()
        valid = torch.zeros(self.crop_size, self.crop_size, dtype=torch.bool)
        source, target = zip(*(self._window(side) for side in image.shape[1:]), strict=True)
        crop[:, target[0], target[1]] = image[:, source[0], source[1]]
        valid[target[0], target[1]] = True
        return crop, valid

    def _window(self, side: int) -> tuple[slice, slice]:
        """Where along one axis the pixels come from, and where in the crop they go."""
        length = min(side, self.crop_size)
        start = int(torch.randint(abs(side - self.crop_size) + 1, ()))
        here, there = slice(start, start + length), slice(0, length)
        return (here, there) if side > self.crop_size else (there, here)


class ScaleAndPad(ScaleFlipCrop):
    """ColorJitter with probability 0.8 before that."""

    def __init__(self, crop_size: int, resize_range: tuple[float, float]):
        super().__init__(crop_size, resize_range)
        self.jitter = transforms.RandomApply([transforms.ColorJitter(**JITTER)], p=0.8)


class ScaleCrop(ScaleFlipCrop):
    """ScaleFlipCrop with padding in the mean colour (DeepLab's)."""

    padding = torch.zeros(3, 1, 1)


class LongSideCrop(ScaleFlipCrop):
    """Resize of the long side to a random whole number of pixels (bilinear), flip, pad with the mean colour and crop.

    resize_range: of that number in crop sizes; both ends are cut to whole numbers, and may be drawn.
    """

    padding = torch.zeros(3, 1, 1)

    def _resized(self, image: np.ndarray) -> np.ndarray:
        low, high = (int(factor * self.crop_size) for factor in self.resize_range)
        long_side, size = max(1, int(torch.randint(low, high + 1, ()))), image.shape[1::-1]
        size = [max(1, round(side * long_side / max(size))) for side in size]
        return cv2.resize(image.astype(np.float32), size, interpolation=cv2.INTER_LINEAR)   # values are not rounded


# as released: MoRe's on VOC, on COCO, AFA's, ACR's, DeepLab's
AUGMENTATIONS = {
    "resized_crop": ResizedCrop, "scale_and_pad": ScaleAndPad, "scale_flip_crop": ScaleFlipCrop,
    "long_side_crop": LongSideCrop, "scale_crop": ScaleCrop,
}


def build_augmentation(data: Data) -> Callable[..., Augmented]:
    """The augmentation that config.data names."""
    return AUGMENTATIONS[data.augmentation](data.crop_size, data.resize_range)
