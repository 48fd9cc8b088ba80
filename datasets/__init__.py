"""Where images and image-level labels come from: VOC layout, COCO layout, generated shapes.

    build_train_set(config)[(index, seed)] -> TrainItem, collate_train(items) -> Batch
    build_val_set(config, split)[index]    -> EvalItem
    build_image_set(config, split)[index]  -> EvalItem without a mask
    ImageFiles(paths, names, ...)[index]   -> FileItem or Unreadable
"""

import logging
import os
from collections.abc import Callable
from pathlib import Path

import torch

from datasets import coco, shapes, voc
from datasets.classes import class_list
from datasets.config import Data
from datasets.files import FileItem, ImageFiles, Unreadable, find_images, unique_names
from datasets.labels import MASKS, load_labels
from datasets.masks import OWN, TrainMasks
from datasets.samples import Sample, find_list, refuse_twice
from datasets.sets import EvalItem, EvalSet, ImageSet, TrainItem, TrainSet, collate_train
from datasets.texts import lines_of, read_text
from datasets.transforms import build_augmentation
from utils.errors import UserError
from utils.files import ROOT
from utils.schema import Section

__all__ = [
    "EvalItem", "EvalSet", "FileItem", "ImageFiles", "ImageSet", "TrainItem", "TrainSet", "Unreadable",
    "build_image_set", "build_train_set", "build_val_set", "class_names", "collate_train", "data_name", "find_images",
    "unique_names",
]

LAYOUTS = {"voc": voc, "coco": coco, "shapes": shapes}
SHAPES_FOLDER = ROOT / "data" / "shapes"
ROOT_VARIABLES = {"voc": "VOC_ROOT", "coco": "COCO_ROOT"}


def build_train_set(config: Section) -> TrainSet:
    """The split config.data.train_split with the augmentation of config.data, and the masks of data.masks.

    The data set's own masks are needed only there, and as labels' source.
    Raises UserError for a missing folder, list, image, label or mask before any training starts.
    """
    data = config.data
    need_masks = data.image_labels == MASKS or data.masks == OWN
    samples, labels_of, classes = _load(data, data.train_split, need_masks)
    given = data.masks is not None
    masks = TrainMasks(data.masks, samples, len(classes) + 1, config.evaluate.bkg) if given else None
    limit = data.max_errors if data.on_error == "skip" else None
    return TrainSet(samples, labels_of, classes, build_augmentation(data), masks, limit)


def build_val_set(config: Section, split: str | None = None) -> EvalSet:
    """The split `split` (None: config.data.val_split) at native size with its masks.

    Raises UserError, also where the masks do not show what the image labels say; a few that do not are logged.
    """
    split = split or config.data.val_split
    if split is None:
        raise UserError("data.val_split is null: give data.val_split=NAME, the split to score, which needs masks")
    dataset = EvalSet(*_load(config.data, split, need_masks=True))
    if (note := dataset.compared()) and int(os.environ.get("RANK", 0)) == 0:
        logging.getLogger("wsss").warning(note)
    return dataset


def build_image_set(config: Section, split: str) -> ImageSet:
    """A split at native size without its masks; with image labels where config.evaluate takes given ones.

    The samples name the masks that are there. Raises UserError.
    """
    if config.evaluate.image_labels == "given":
        return ImageSet(*_load(config.data, split, need_masks=config.data.image_labels == MASKS))
    root = find_root(config.data)
    samples, _ = _samples(config.data, root, split, need_masks=False)
    return ImageSet(samples, None, classes_of(config.data, root))


def data_name(data: Data) -> str:
    """What scores are said to be of; generated images also bear the version of their drawing."""
    return f"shapes v{shapes.VERSION}" if data.name == "shapes" else data.name


def class_names(data: Data) -> tuple[str, ...]:
    """The names of the classes, without background: data.classes, else the data set's own."""
    return tuple(data.classes) if data.classes else LAYOUTS[data.name].CLASSES


def _load(
    data: Data, split: str, need_masks: bool
) -> tuple[list[Sample], Callable[[Sample], torch.Tensor], tuple[str, ...]]:
    """Samples, labels (a function of a sample) and classes of a split."""
    root = find_root(data)
    samples, list_path = _samples(data, root, split, need_masks)
    classes = classes_of(data, root)
    return samples, load_labels(data.image_labels, root, list_path.parent, samples, classes), classes


def classes_of(data: Data, root: Path) -> tuple[str, ...]:
    """As `class_names`, but the folder's own classes.txt, one name on each line, comes before the data set's."""
    own = root / "classes.txt"
    if data.classes or not own.is_file():
        return class_names(data)
    return class_list(lines_of(read_text(own)), own)


def _samples(data: Data, root: Path, split: str, need_masks: bool) -> tuple[list[Sample], Path]:
    """The samples of a split, and its list."""
    layout = LAYOUTS[data.name]
    list_path = find_list(split, layout.list_folders(root), root)
    samples = layout.read_samples(root, list_path, need_masks)
    refuse_twice([sample.name for sample in samples], [sample.image for sample in samples], list_path)
    return samples, list_path


def find_root(data: Data) -> Path:
    """The data's folder: data.root, else the environment variable of the data set; shapes are generated if need be.

    Raises UserError where neither is given (but for shapes) or the folder is missing.
    """
    if data.name == "shapes":
        own = SHAPES_FOLDER / "v{}_seed{seed}_{train}_{val}_{size}px".format(shapes.VERSION, **dict(data.shapes))
        root = Path(data.root).expanduser() if data.root else own
        shapes.generate(root, **dict(data.shapes))
        return root
    variable = ROOT_VARIABLES[data.name]
    root = data.root or os.environ.get(variable)
    if not root:
        raise UserError(f"where does the {data.name} data lie? Give data.root=FOLDER or set {variable}=FOLDER")
    root = Path(root).expanduser()
    if not root.is_dir():
        raise UserError(f"{root}: no such folder (data.root or {variable})")
    return root
