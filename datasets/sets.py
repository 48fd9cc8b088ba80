"""The two torch data sets: random crops to train on, whole images with their masks to evaluate on."""

import hashlib
from collections.abc import Callable
from typing import NamedTuple

import numpy as np
import torch
from torch.utils.data import Dataset

from datasets import agreement
from datasets.labels import TableLabels
from datasets.masks import TrainMasks
from datasets.samples import Sample
from datasets.transforms import seeded
from utils.batch import Batch, boxes_of, most_classes
from utils.errors import UserError, name_some
from utils.files import hash_of_names
from utils.images import check_same_size, normalize, read_label_map, read_rgb


class TrainItem(NamedTuple):
    """name; image float32 (3, S, S) normalised; labels float32 (K,); valid bool (S, S); seed; label_map uint8 (S, S),
    None where no masks are learned from; skipped: (name, why) of the images that could not be read in its place."""

    name: str
    image: torch.Tensor
    labels: torch.Tensor
    valid: torch.Tensor
    seed: int
    label_map: torch.Tensor | None = None
    skipped: tuple[tuple[str, str], ...] = ()


class EvalItem(NamedTuple):
    """name; image float32 (3, H, W) normalised, native size; labels float32 (K,); label_map uint8 (H, W).

    The items of an ImageSet have no label map, and labels only where it has some: None otherwise.
    """

    name: str
    image: torch.Tensor
    labels: torch.Tensor | None
    label_map: np.ndarray | None


class _ImageSet(Dataset):
    """Samples with their labels. classes: names without background; names: of the images, in order."""

    def __init__(self, samples: list[Sample], labels_of: Callable | None, classes: tuple[str, ...]):
        self.samples, self.labels_of, self.classes = samples, labels_of, classes
        self.names = [sample.name for sample in samples]

    def __len__(self) -> int:
        return len(self.samples)

    def facts(self) -> dict[str, str]:
        """Counts and hashes of its images, classes and, where they are at hand, labels, wherever the files lie."""
        known = self.samples if isinstance(self.labels_of, TableLabels) else []
        labels = [self.labels_of.identity(sample).hex() for sample in known]
        facts = {"images": self.names, "classes": self.classes, "image labels": labels}
        return {name: hash_of_names(fact) for name, fact in facts.items()}


class TrainSet(_ImageSet):
    """Indexed by (index, seed): the augmentation's every draw comes from the seed, whatever process or worker asks.

    masks: those that are learned from, None for none. max_errors: None: a sample that cannot be read is a UserError;
    else the next one that can be, in the set's order, takes its place with the same seed; more than so many are one.
    """

    def __init__(
        self, samples, labels_of, classes, augmentation: Callable, masks: TrainMasks | None = None,
        max_errors: int | None = None,
    ):
        super().__init__(samples, labels_of, classes)
        self.augmentation, self.masks, self.max_errors = augmentation, masks, max_errors

    def __getitem__(self, key: tuple[int, int]) -> TrainItem:
        index, seed = int(key[0]), int(key[1])
        skipped: dict[str, str] = {}
        while True:
            sample = self.samples[(index + len(skipped)) % len(self)]
            try:
                image, label_map, labels = self._read(sample)
                break
            except UserError as error:
                if self.max_errors is None:
                    raise
                skipped[sample.name] = str(error)
                refuse_many(skipped, min(self.max_errors, len(self) - 1))
        with seeded(seed):
            crop, valid, label_map = self.augmentation(image, label_map)
        return TrainItem(sample.name, crop, labels, valid, seed, label_map, tuple(skipped.items()))

    def _read(self, sample: Sample) -> tuple[np.ndarray, np.ndarray | None, torch.Tensor]:
        """Its image, the mask to learn from and its labels. Raises UserError."""
        image = read_rgb(sample.image)
        label_map = None if self.masks is None else self.masks.read(sample, image.shape[:2])
        return image, label_map, self.labels_of(sample)


def refuse_many(skipped: dict[str, str], limit: int) -> None:
    """Raises UserError where more than `limit` images could not be read. skipped: name -> why."""
    if len(skipped) > limit:
        raise UserError(
            f"{len(skipped)} training images cannot be read, too many to go on (data.max_errors): {name_some(skipped)}"
            f"; the first: {next(iter(skipped.values()))}; tools/check_dataset.py lists all that is wrong"
        )


class EvalSet(_ImageSet):
    """Indexed by the image's number. Raises UserError where image and mask differ in size."""

    def compared(self) -> str | None:
        """The line of `agreement.compare` on some of the masks, evenly spread. Raises UserError as that does."""
        some = self.samples[:: agreement.step(len(self))]
        labels = ({index + 1 for index in self.labels_of(sample).nonzero().flatten().tolist()} for sample in some)
        masks = [sample.mask for sample in some]
        return agreement.compare(zip(masks, labels, map(agreement.ids_in, masks), strict=True), self.classes)

    def __getitem__(self, index: int) -> EvalItem:
        sample = self.samples[index]
        image = read_rgb(sample.image)
        label_map = read_label_map(sample.mask, len(self.classes) + 1)
        check_same_size(image.shape[:2], sample.image, label_map, sample.mask)
        return EvalItem(sample.name, normalize(image), self.labels_of(sample), label_map)


class ImageSet(_ImageSet):
    """Whole images, indexed by the image's number, their masks unread. labels_of None: the items have no labels."""

    def __getitem__(self, index: int) -> EvalItem:
        sample = self.samples[index]
        labels = None if self.labels_of is None else self.labels_of(sample)
        return EvalItem(sample.name, normalize(read_rgb(sample.image)), labels, None)

    def identity(self) -> str:
        """A hash of its images' paths and of their labels."""
        digest = hashlib.sha256()
        for sample in self.samples:
            labels = b"" if self.labels_of is None else self.labels_of.identity(sample)
            digest.update(f"{sample.image.resolve()}\0".encode() + labels)
        return digest.hexdigest()


def collate_train(items: list[TrainItem]) -> Batch:
    """TrainItems -> Batch."""
    names, images, labels, valid, seeds, masks, skipped = zip(*items, strict=True)
    labels, valid = torch.stack(labels), torch.stack(valid)
    tensors = torch.stack(images), labels, valid, torch.tensor(seeds)
    masks = None if masks[0] is None else torch.stack(masks)
    return Batch(list(names), *tensors, most_classes(labels), boxes_of(valid), masks, sum(skipped, ()))
