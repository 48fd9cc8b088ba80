"""The masks that a training learns from: those of a folder, by the images' names, or the data set's own."""

import hashlib
import os
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from datasets.irn import irn_ids
from datasets.samples import Sample
from utils.errors import UserError, name_some
from utils.images import IGNORE, check_same_size, image_size, read_label_map

OWN = "own"   # the value of data.masks that asks for the data set's own masks


class TrainMasks:
    """NAME.png, ids 0..K and 255, or NAME.npy as irn's make_cam writes it, for the image of that name.

    source: data.masks. num_ids: K + 1. bkg: the threshold of irn's maps. Raises UserError unless every image has one.
    """

    def __init__(self, source: str, samples: Sequence[Sample], num_ids: int, bkg: float) -> None:
        self.source, self.num_ids, self.bkg = source, num_ids, bkg
        self.paths = {sample.name: sample.mask for sample in samples} if source == OWN else self._found(samples)

    def _found(self, samples: Sequence[Sample]) -> dict[str, Path]:
        folder = Path(self.source).expanduser()
        if not folder.is_dir():
            raise UserError(f"{folder}: no such folder (data.masks; {OWN} means the data set's own masks)")
        there = set(os.listdir(folder))
        files = {one.name: (f"{one.name}.png", f"{one.name}.npy") for one in samples}
        found = {name: [file for file in both if file in there] for name, both in files.items()}
        for names in found.values():
            if len(names) > 1:
                raise UserError(f"{folder}: holds {names[0]} and {names[1]} for one image; remove the one or the other")
        if missing := [name for name, names in found.items() if not names]:
            count = f"{len(missing)} of the {len(found)} training images"
            raise UserError(f"{folder}: no NAME.png or NAME.npy for {count} (data.masks): {name_some(missing)}")
        return {name: folder / names[0] for name, names in found.items()}

    def read(self, sample: Sample, size: tuple[int, int]) -> np.ndarray:
        """The ids uint8 (H, W) of an image of this size. Raises UserError."""
        path = self.paths[sample.name]
        is_irn = path.suffix == ".npy"
        ids = irn_ids(path, self.bkg, self.num_ids, size) if is_irn else read_label_map(path, self.num_ids)
        check_same_size(size, sample.image, ids, path)
        return ids

    def facts(self, sample: Sample) -> tuple[np.ndarray, bytes]:
        """How many pixels have each id, int64 (256,), and a hash of the file and of its threshold. Raises as `read`."""
        path = self.paths[sample.name]
        pixels = np.bincount(self.read(sample, image_size(sample.image)).ravel(), minlength=IGNORE + 1)
        cut = f"{path.name} {self.bkg if path.suffix == '.npy' else ''}\0".encode()
        return pixels, hashlib.sha256(cut + path.read_bytes()).digest()
