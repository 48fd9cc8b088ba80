"""Images a user names one by one: files, folders, patterns, lists; of any size, without labels or masks."""

import functools
import glob
import os
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import NamedTuple

import cv2
import numpy as np
import torch
from torch.utils.data import Dataset

from utils.errors import UserError
from utils.images import normalize, read_rgb

SUFFIXES = (".jpg", ".jpeg", ".jpe", ".png", ".bmp", ".webp", ".tif", ".tiff", ".gif", ".ppm", ".pgm", ".jp2")
LONGEST = 16384   # pixels of a side


class FileItem(NamedTuple):
    """name; image float32 (3, H, W) normalised; labels float32 (K,) or None; path; size (H, W) of the file's image."""

    name: str
    image: torch.Tensor
    labels: torch.Tensor | None
    path: Path
    size: tuple[int, int]


class Unreadable(NamedTuple):
    """An image that cannot be computed, and the line that says why."""

    name: str
    reason: str


class ImageFiles(Dataset):
    """Files indexed by number, with `names`; what cannot be read is an Unreadable.

    labels: multi-hot float32 (K,), the same for all; None for none. least: shortest side, in pixels, that a method
    can take. most: an image of more pixels, or of a longer side than LONGEST, is reduced to that. becomes: the size
    (h, w) -> that in which the method takes it; None: as it is.
    """

    def __init__(
        self, paths: Sequence[Path], names: Sequence[str], labels: torch.Tensor | None, least: int, most: int,
        becomes: Callable[[int, int], tuple[int, int]] | None = None,
    ) -> None:
        self.paths, self.names, self.labels, self.least, self.most = list(paths), list(names), labels, least, most
        self.becomes = becomes

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, index: int) -> FileItem | Unreadable:
        path, name = self.paths[index], self.names[index]
        try:
            image = read_rgb(path)
        except UserError as error:
            return Unreadable(name, str(error))
        size, image = image.shape[:2], self._reduced(image)
        height, width = self.becomes(*image.shape[:2]) if self.becomes else image.shape[:2]
        if min(height, width) < self.least:
            where = "at native size" if (height, width) == image.shape[:2] else "with evaluate.long_side"
            need = f"{where} a side needs {self.least} or more; give evaluate.base_size"
            return Unreadable(name, f"{path}: {width}x{height} pixels are computed, {need}")
        return FileItem(name, normalize(image), self.labels, path, size)

    def _reduced(self, image: np.ndarray) -> np.ndarray:
        height, width = image.shape[:2]
        factor = min(1, (self.most / (height * width)) ** 0.5, LONGEST / max(height, width))
        size = max(1, int(width * factor)), max(1, int(height * factor))
        return image if factor == 1 else cv2.resize(image, size, interpolation=cv2.INTER_AREA)


def find_images(inputs: Iterable[str], leave_out: Path) -> list[tuple[Path, Path]]:
    """(folder, image) of every image that the inputs mean, each image once, all paths absolute.

    inputs: files; folders, searched as `files_below` does; patterns such as 'a/**/*.jpg'. folder: the input folder an
    image was found in, else its own. leave_out: a folder where nothing is looked for. A file that is not there is
    listed all the same. Raises UserError for a folder or pattern without an image.
    """
    real, found = functools.cache(os.path.realpath), {}

    def place_of(image: Path) -> Path:
        return Path(real(image.parent), image.name)

    hidden = Path(real(leave_out))
    for text in inputs:
        path = Path(os.path.abspath(Path(text).expanduser()))
        if path.is_dir():
            images = [(path, image) for image in files_below(path, SUFFIXES) if hidden not in place_of(image).parents]
        elif path.exists() or not glob.has_magic(text):
            images = [(path.parent, path)]
        else:
            images = [(image.parent, image) for image in _matches(path) if hidden not in place_of(image).parents]
        if not images:
            raise UserError(f"{text}: no image there (looked for {' '.join(SUFFIXES)})")
        for folder, image in images:
            found.setdefault(place_of(image), (folder, image))
    return list(found.values())


def _matches(pattern: Path) -> list[Path]:
    """The images that a pattern means; glob itself would go round in links below **."""
    start, deep, rest = f"{pattern}/".partition("/**/")
    if deep:
        folders = map(Path, glob.glob(f"{start}/"))
        below = ((folder, image) for folder in folders for image in files_below(folder, SUFFIXES))
        return sorted(image for folder, image in below if image.relative_to(folder).match(rest or "*"))
    matches = sorted(map(Path, glob.glob(str(pattern))))
    return [image for image in matches if image.suffix.lower() in SUFFIXES and not image.is_dir()]


def files_below(folder: Path, suffixes: tuple[str, ...]) -> list[Path]:
    """The files of these endings in a folder and all below it, also behind links; a folder reached twice counts once.

    Names that begin with a dot are left out. A link to a folder above is not followed, one to nothing is listed where
    it has such an ending. Raises UserError for any other link to nothing, and for a folder that cannot be read.
    """
    waiting, found = [folder], []
    seen = set(map(str, Path(os.path.realpath(folder)).parents))
    while waiting:
        place = waiting.pop()   # links come last, so that what is reached without them is named without them
        if (real := os.path.realpath(place)) in seen:
            continue
        seen.add(real)
        try:
            names = sorted(os.listdir(place))
        except OSError as error:
            raise UserError(f"{place}: cannot be read ({error.strerror})") from None
        for path in (place / name for name in names if not name.startswith(".")):
            if path.is_dir():
                waiting.insert(0 if path.is_symlink() else len(waiting), path)
            elif path.suffix.lower() in suffixes:
                found.append(path)
            elif path.is_symlink() and not path.exists():
                raise UserError(f"{path}: is a link to nothing, {os.readlink(path)}; mend or remove it")
    return sorted(found)


def unique_names(found: Sequence[tuple[Path, Path]]) -> list[str]:
    """A name for every (folder, image): its path from the folder, without the ending.

    Those that would be alike get more of their folders, those alike but for the ending keep it.
    """
    depth = [len(image.relative_to(folder).parts) for folder, image in found]
    stems = Counter(image.with_suffix("") for _, image in found)
    kept = [stems[image.with_suffix("")] > 1 for _, image in found]
    while True:
        groups = defaultdict(list)
        for index, (_, image) in enumerate(found):
            path = image if kept[index] else image.with_suffix("")
            groups["/".join(path.parts[-depth[index] :])].append(index)
        alike = [group for group in groups.values() if len(group) > 1]
        if not alike:
            return sorted(groups, key=lambda name: groups[name][0])
        for group in alike:
            same_folder = len({found[index][1].parent for index in group}) < len(group)
            for index in group:
                kept[index] = kept[index] or same_folder
                depth[index] = min(depth[index] + (not same_folder), len(found[index][1].parts) - 1)
