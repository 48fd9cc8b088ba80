"""All that is wrong with a data set, where a training stops at the first: every image and every mask is read once."""

import hashlib
import time
from collections import Counter, defaultdict
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from datasets import LAYOUTS, agreement, classes_of, find_root
from datasets.labels import find_source, open_labels
from datasets.masks import OWN
from datasets.prepare.preparation import parallel
from datasets.samples import Sample, find_list, read_list
from utils.errors import UserError
from utils.images import IGNORE, check_same_size, known_ids, read_ids, read_rgb
from utils.schema import Section

LIST, LABELS = "list that cannot be read", "no labels, or wrong ones"
NOTE = "note, no fault: labels name a class that the mask lacks"   # of tiny objects, or at the rim, which is 255


class Fault(NamedTuple):
    """name: the image's, None where it is of no single one. what: the line that names the file."""

    kind: str
    name: str | None
    what: str


class Report(NamedTuple):
    """summary: what was read."""

    summary: str
    faults: list[Fault]

    @property
    def clean(self) -> bool:
        return all(fault.kind == NOTE for fault in self.faults)

    def text(self, show: int) -> str:
        """A table of the kinds, with up to `show` faults of each."""
        lines, kinds = [self.summary], defaultdict(list)
        for fault in self.faults:
            kinds[fault.kind].append(fault.what)
        for kind, found in kinds.items():
            more = [f"and {len(found) - show} more"] if len(found) > show else []
            lines += [f"{len(found):8d}  {kind}", *(f"{'':12}{line}" for line in found[:show] + more)]
        return "\n".join(lines if kinds else [*lines, "nothing is wrong"])

    def as_json(self) -> dict:
        faults, counts = [fault._asdict() for fault in self.faults], Counter(fault.kind for fault in self.faults)
        return {"summary": self.summary, "clean": self.clean, "counts": counts, "faults": faults}


class _Faults(list):
    def add(self, kind: str, name: str | None, what: str) -> None:
        self.append(Fault(kind, name, what))

    def of(self, kind: str, name: str | None, function: Callable, *arguments: object) -> Any:
        """What function gives; None where it raises a UserError, which becomes a fault."""
        try:
            return function(*arguments)
        except UserError as error:
            self.add(kind, name, str(error))
            return None


def check(config: Section, splits: Sequence[str], workers: int) -> Report:
    """Reads the splits of config.data with `workers` processes. Raises UserError where a folder or list is missing."""
    started, faults, data, root = time.perf_counter(), _Faults(), config.data, find_root(config.data)
    layout, classes = LAYOUTS[data.name], classes_of(data, root)
    lists = {split: find_list(split, layout.list_folders(root), root) for split in dict.fromkeys(splits)}
    places = {split: find_source(data.image_labels, root, path.parent) for split, path in lists.items()}
    samples, within = {}, defaultdict(list)
    for split, path in lists.items():
        need_masks = split == data.val_split or data.masks == OWN or places[split] is None
        samples[split] = _samples(layout, root, path, need_masks, faults)
        for sample in samples[split]:
            within[sample].append(split)
    ids, pictures = {}, defaultdict(dict)
    read = parallel(partial(_read, len(classes) + 1), within, workers, "check", len(within))
    for (sample, own), (digest, ids[sample], found) in zip(within.items(), read, strict=True):
        faults += found
        if len(own) > 1:
            faults.add("image in two splits", sample.name, f"{sample.image}: in {' and '.join(own)}")
        if digest is not None:
            pictures[digest][sample.image] = own
    for paths in (paths for paths in pictures.values() if len(paths) > 1):
        words = " and ".join(f"{path} ({', '.join(own)})" for path, own in paths.items())
        where = "twice in a split" if len(set().union(*paths.values())) == 1 else "in two splits"
        faults.add(f"same pixels {where}", next(iter(paths)).stem, words)
    others = (path for folder in layout.list_folders(root) for path in folder.glob("*.txt"))
    listed = {name for path in {*lists.values(), *others} for name in _names_in(path)}
    for split, labels in _labels(places, samples, listed, classes, faults).items():
        _compare([sample for sample in samples[split] if ids[sample] is not None], labels, ids, classes, faults)
    count = f"{len(within)} images and {sum(sample.mask is not None for sample in within)} masks"
    names = ", ".join(f"{len(members)} images in {split}" for split, members in samples.items())
    seconds = time.perf_counter() - started
    return Report(f"{data.name} {root}: {names}; {count} read in {seconds:.1f} s", list(dict.fromkeys(faults)))


def _samples(layout, root: Path, path: Path, need_masks: bool, faults: _Faults) -> list[Sample]:
    """The samples of a list, each once. need_masks: each needs a mask; else it does where others of the list have."""
    if faults.of(LIST, None, read_list, path) is None:
        return []
    wrong: list[UserError] = []
    samples = layout.read_samples(root, path, False, wrong)
    for error in wrong:
        faults.add("no image for a line of a list", None, str(error))
    for name, count in Counter(sample.name for sample in samples).items():
        if count > 1:
            faults.add("named twice in a list", name, f"{path}: names image '{name}' {count} times")
    need_masks |= any(sample.mask for sample in samples)
    for sample in samples:
        if need_masks and sample.mask is None:
            faults.add("missing mask", sample.name, f"{sample.image}: image of {path} has no mask")
    return list(dict.fromkeys(samples))


def _read(num_ids: int, sample: Sample) -> tuple[str | None, set[int] | None, list[Fault]]:
    """A hash of the image's pixels, the ids of its mask (None: there is none, or a broken one), and what is wrong."""
    faults, name, ids, digest = _Faults(), sample.name, None, None
    if (image := faults.of("broken image", name, read_rgb, sample.image)) is not None:
        digest = hashlib.sha256(f"{image.shape}".encode() + image.tobytes()).hexdigest()
    if sample.mask is not None and (ids := faults.of("broken mask", name, read_ids, sample.mask)) is not None:
        if image is not None:
            faults.of("mask of another size", name, check_same_size, image.shape[:2], sample.image, ids, sample.mask)
        ids = faults.of("unknown id in a mask", name, known_ids, ids, num_ids, sample.mask)
    return digest, None if ids is None else set(np.bincount(ids.ravel()).nonzero()[0].tolist()), faults


def _names_in(path: Path) -> set[str]:
    """What the lines of a list may call an image, also one that is missing."""
    lines = [Path(entry[0]) for entry in _Faults().of(LIST, None, read_list, path) or ()]
    return {name for line in lines for name in (line.name, line.stem)}


def _labels(
    places: dict[str, Path | None], samples: dict[str, list[Sample]], listed: set[str], classes: tuple, faults: _Faults
) -> dict[str, dict[str, set[int]]]:
    """The ids of the labels by the images' names, of each split whose labels are not those of the masks."""
    labels = {}
    for place in filter(None, dict.fromkeys(places.values())):
        names = {split: [sample.name for sample in samples[split]] for split in samples if places[split] == place}
        every = list(dict.fromkeys(name for some in names.values() for name in some))
        if (opened := faults.of(LABELS, None, open_labels, place, every, classes)) is None:
            continue
        table = {name: faults.of(LABELS, name, opened[1], name) for name in opened[0]}
        ids = {name: set((np.flatnonzero(vector) + 1).tolist()) for name, vector in table.items() if vector is not None}
        for name in (name for name in table if name not in listed):
            faults.add("labels of an image that no list names", name, f"{place}: {name}")
        for name in (name for name in every if name not in table):
            faults.add(LABELS, name, f"{place}: no labels for image {name}")
        for split, some in names.items():
            labels[split] = {name: ids[name] for name in some if name in ids}
            if labels[split] and not any(labels[split].values()):
                faults.add(LABELS, None, f"{place}: none of the {len(some)} images of {split} has a class")
    return labels


def _compare(samples: list[Sample], labels: dict[str, set[int]], ids: dict, classes: tuple, faults: _Faults) -> None:
    """Whether the masks show what the labels say."""
    rows = [(sample.mask, labels[sample.name], ids[sample]) for sample in samples if sample.name in labels]
    faults.of("masks of other classes", None, agreement.compare, rows, classes)
    for mask, named, shown in rows:
        for kind, other in (("mask shows a class that its labels lack", shown - {0, IGNORE} - named),
                            (NOTE, named - shown)):
            if other:
                faults.add(kind, mask.stem, f"{mask}: {', '.join(classes[k - 1] for k in sorted(other))}")
