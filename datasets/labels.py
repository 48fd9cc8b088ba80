"""Image-level labels: multi-hot vectors (K,) from JSON, XML, masks or the released one-hot dictionaries.

    cls_labels_onehot.npy   dictionary name -> (K,), the form AFA, ToCo and MoRe release
    labels.json             {"name": ["class name", ...], ...}
    Annotations/NAME.xml    VOC annotations; every <object> counts, those marked difficult too: the object is in the
                            image all the same (classification benchmarks drop difficult ones, WSSS papers do not)
    masks                   ids in the mask except 0 and 255
"""

from collections.abc import Callable, Collection, Iterable, Sequence
from pathlib import Path
from typing import BinaryIO
from xml.etree import ElementTree

import numpy as np
import torch

from datasets.onehot import read_onehot
from datasets.samples import Sample
from datasets.texts import read_json
from utils.errors import UserError, did_you_mean
from utils.images import IGNORE, read_label_map

MASKS = "masks"  # the value of data.image_labels that asks for labels from masks


class TableLabels:
    """Labels known beforehand: called with a Sample, returns float32 (K,)."""

    def __init__(self, table: dict[str, np.ndarray]):
        self.table = table

    def __call__(self, sample: Sample) -> torch.Tensor:
        return torch.from_numpy(self.table[sample.name].copy())

    def identity(self, sample: Sample) -> bytes:
        """What the labels of a sample are known by."""
        return self.table[sample.name].tobytes()


class MaskLabels:
    """Labels read from each sample's mask when asked for: called with a Sample, returns float32 (K,)."""

    def __init__(self, num_classes: int):
        self.num_classes = num_classes

    def __call__(self, sample: Sample) -> torch.Tensor:
        return labels_of_mask(read_label_map(sample.mask, self.num_classes + 1), self.num_classes)

    def identity(self, sample: Sample) -> bytes:
        """What the labels of a sample are known by: its mask's path; the mask is not read."""
        return str(sample.mask).encode()


def load_labels(
    source: str | None, root: Path, list_folder: Path, samples: list[Sample], classes: tuple[str, ...]
) -> Callable[[Sample], torch.Tensor]:
    """The labels of `samples` as a function of a Sample.

    source: a .json or .npy file, a folder of XML files, 'masks', or None: the first there is of
        cls_labels_onehot.npy (in root, next to the list), labels.json (likewise), Annotations/, masks.
    Raises UserError for a missing or broken source, a vector of another length than K, an unknown class name
    and a sample without labels.
    """
    place = find_source(source, root, list_folder)
    if place is None:
        bare = next((sample for sample in samples if sample.mask is None), None)
        if bare is not None:
            looked_for = "" if source else " (no cls_labels_onehot.npy, labels.json or Annotations either)"
            raise UserError(f"{root}: image {bare.name} has no mask to take labels from{looked_for}")
        return MaskLabels(len(classes))
    names = [sample.name for sample in samples]
    known, vector_of = open_labels(place, names, classes)
    table = {name: vector_of(name) for name in known}
    missing = next((name for name in names if name not in table), None)
    if missing is not None:
        raise UserError(f"{place}: no labels for image {missing}")
    if not any(table[name].any() for name in names):
        raise UserError(f"{place}: none of the {len(names)} images has a class; docs/data.md says how to give it")
    return TableLabels({name: table[name] for name in names})


def find_source(source: str | None, root: Path, list_folder: Path) -> Path | None:
    """The file or folder of the labels, as `load_labels` takes it; None means masks. Raises UserError."""
    return _default_source(root, list_folder) if source is None else _given_source(source, root)


def open_labels(
    place: Path, names: Sequence[str], classes: tuple[str, ...]
) -> tuple[Collection[str], Callable[[str], np.ndarray]]:
    """The images that a source has labels of, and the labels float32 (K,) of such a name, or UserError where they are
    wrong. names: what a folder is asked for. Raises UserError for a source that cannot be read at all."""
    if place.is_dir():
        return names, lambda name: _read_xml(place / f"{name}.xml", name, classes)
    if place.suffix == ".json":
        present = read_named_classes(place)
        return present, lambda name: multi_hot(present[name], classes, place, name)
    table = read_onehot(place)
    return table, lambda name: _checked(table[name], name, classes, place)


def labels_of_mask(label_map: np.ndarray, num_classes: int) -> torch.Tensor:
    """Ids present in label_map (H, W), without background and ignore, as multi-hot float32 (K,)."""
    ids = np.unique(label_map)
    labels = torch.zeros(num_classes)
    labels[torch.from_numpy(ids[(ids != 0) & (ids != IGNORE)].astype(np.int64)) - 1] = 1
    return labels


def _given_source(source: str, root: Path) -> Path | None:
    """Where the labels lie, relative to the working folder or to the data's root; None means masks."""
    if source == MASKS:
        return None
    place = next((path for path in (Path(source), root / source) if path.exists()), None)
    if place is None:
        raise UserError(f"{source}: no such file or folder of image labels (data.image_labels)")
    if place.is_file() and place.suffix not in (".json", ".npy"):
        raise UserError(f"{place}: image labels are a .json or .npy file, a folder of XML files, or 'masks'")
    return place


def _default_source(root: Path, list_folder: Path) -> Path | None:
    onehot = "cls_labels_onehot.npy"
    places = (root / onehot, list_folder / onehot, root / "labels.json", list_folder / "labels.json")
    found = next((path for path in places if path.is_file()), None)
    if found is None and (root / "Annotations").is_dir():
        return root / "Annotations"
    return found


def read_named_classes(path: Path) -> dict[str, list[str]]:
    """{image: [class, ...]} of a JSON file. Raises UserError."""
    content = read_json(path)
    if not isinstance(content, dict):
        raise UserError(f"{path}: image labels must be an object of name -> list of class names")
    for name, present in content.items():
        if not isinstance(present, list) or not all(isinstance(label, str) for label in present):
            raise UserError(f"{path}: labels of image {name} must be a list of class names, not {present!r}")
    return content


def _read_xml(path: Path, name: str, classes: tuple[str, ...]) -> np.ndarray:
    try:
        return multi_hot(annotated_classes(path), classes, path, name)
    except FileNotFoundError:
        raise UserError(f"{path}: no labels for image {name}, the annotation is missing") from None


def annotated_classes(annotation: Path | BinaryIO) -> list[str]:
    """The class of every <object> of a VOC annotation, in its order, those of parts of a body left out.

    Raises FileNotFoundError where there is no such file, UserError where it cannot be read.
    """
    try:
        tree = ElementTree.parse(annotation)
    except FileNotFoundError:
        raise
    except (OSError, ElementTree.ParseError, ValueError, LookupError) as error:   # the last two: of its encoding
        raise UserError(f"{annotation}: annotation cannot be read ({error})") from None
    if (root := tree.getroot().tag) != "annotation":
        raise UserError(f"{annotation}: is no annotation of VOC, it begins with <{root}>")
    return [(found.findtext("name") or "").strip() for found in tree.getroot().findall("object")]


def multi_hot(present: Iterable[str], classes: tuple[str, ...], source: object, name: str) -> np.ndarray:
    """The classes of image `name` as float32 (K,). Raises UserError naming source, image and an unknown class."""
    labels = np.zeros(len(classes), np.float32)
    for label in present:
        if label not in classes:
            raise UserError(f"{source}: image {name} has the unknown class {label!r}{did_you_mean(label, classes)}")
        labels[classes.index(label)] = 1
    return labels


def _checked(labels: np.ndarray, name: str, classes: tuple[str, ...], path: Path) -> np.ndarray:
    if labels.shape != (len(classes),):
        size = labels.shape[0] if labels.ndim == 1 else labels.shape
        raise UserError(
            f"{path}: the label vector of {name} has length {size}, but there are {len(classes)} classes"
            " (see data.classes)"
        )
    if not np.isin(labels, (0, 1)).all():
        raise UserError(f"{path}: the label vector of {name} holds other values than 0 and 1")
    return labels
