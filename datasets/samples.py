"""What every layout on disk shares: the sample, the split list, the check that files are there."""

import os
from collections.abc import Callable, Sequence
from functools import lru_cache
from pathlib import Path
from typing import NamedTuple

from datasets.texts import lines_of, read_text
from utils.errors import UserError


class Sample(NamedTuple):
    """One image of a split. mask is None where the data set has none (training needs none)."""

    name: str
    image: Path
    mask: Path | None


def find_list(split: str, folders: tuple[Path, ...], root: Path) -> Path:
    """The list file of a split: `split` itself where it is a .txt path, else SPLIT.txt in the first folder with it.

    Raises UserError naming the places looked at.
    """
    if split.endswith(".txt"):
        candidates = [Path(split), root / split]
    else:
        candidates = [folder / f"{split}.txt" for folder in folders]
    for path in candidates:
        if path.is_file():
            return path
    there = sorted({path.stem for folder in folders for path in folder.glob("*.txt") if path.stem != "classes"})
    known = f"; there are {', '.join(there)}" if there else ""
    raise UserError(f"split {split!r} not found: looked for {', '.join(map(str, candidates))}{known}")


def read_list(path: Path) -> list[list[str]]:
    """The non-empty lines of a list file, each split at white space. Raises UserError when there are none."""
    entries = [line.split() for line in lines_of(read_text(path))]
    if not entries:
        raise UserError(f"{path}: the split is empty; it must name at least one image")
    return entries


def read_lines(path: Path, read: Callable[[list[str]], Sample], faults: list[UserError] | None) -> list[Sample]:
    """What `read` makes of each line of a list. Its UserErrors are raised, or go into `faults` where that is a list."""
    samples = []
    for entry in read_list(path):
        try:
            samples.append(read(entry))
        except UserError as error:
            if faults is None:
                raise
            faults.append(error)
    return samples


def refuse_twice(names: Sequence[str], images: Sequence[object], source: object) -> None:
    """Raises UserError where two of the images a list names are of one name: labels and results are known by it."""
    known: dict[str, object] = {}
    for name, image in zip(names, images, strict=True):
        if name in known:
            raise UserError(f"{source}: names image {name!r} twice, {known[name]} and {image}; rename or leave out one")
        known[name] = image


def require_folder(path: Path) -> None:
    """Raises UserError unless `path` is a folder."""
    if not path.is_dir():
        raise UserError(f"{path}: no such folder; check data.root")


@lru_cache(maxsize=16)
def _list_folder(path: str, _mtime: int) -> frozenset[str]:
    return frozenset(os.listdir(path))


def list_folder(path: Path) -> frozenset[str]:
    """File names in a folder, empty where it is missing; listed once, which is sooner than asking for every file."""
    try:
        return _list_folder(str(path), os.stat(path).st_mtime_ns)
    except OSError:
        return frozenset()
