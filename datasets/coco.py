"""The COCO 2014 layout on disk.

    ROOT/JPEGImages/{train2014,val2014}/COCO_train2014_000000000009.jpg
    ROOT/SegmentationClass/{train2014,val2014}/COCO_train2014_000000000009.png   or 000000000009.png
    SPLIT.txt (train, val, val_part, ...) in ROOT/ImageSets/Segmentation, ROOT or ROOT/SegmentationClass

The folders may also be called train and val. An image's folder follows from its name.
"""

import re
from pathlib import Path

from datasets.samples import Sample, list_folder, read_lines, require_folder
from utils.errors import UserError

CLASSES = (
    "person", "bicycle", "car", "motorcycle", "airplane", "bus", "train", "truck", "boat", "traffic light",
    "fire hydrant", "stop sign", "parking meter", "bench", "bird", "cat", "dog", "horse", "sheep", "cow",
    "elephant", "bear", "zebra", "giraffe", "backpack", "umbrella", "handbag", "tie", "suitcase", "frisbee",
    "skis", "snowboard", "sports ball", "kite", "baseball bat", "baseball glove", "skateboard", "surfboard",
    "tennis racket", "bottle", "wine glass", "cup", "fork", "knife", "spoon", "bowl", "banana", "apple", "sandwich",
    "orange", "broccoli", "carrot", "hot dog", "pizza", "donut", "cake", "chair", "couch", "potted plant", "bed",
    "dining table", "toilet", "tv", "laptop", "mouse", "remote", "keyboard", "cell phone", "microwave", "oven",
    "toaster", "sink", "refrigerator", "book", "clock", "vase", "scissors", "teddy bear", "hair drier", "toothbrush",
)  # fmt: skip

_NAME = re.compile(r"COCO_(train|val|test)(\d{4})_(\d{12})")


def list_folders(root: Path) -> tuple[Path, ...]:
    """Where split lists may lie, in the order of preference."""
    return root / "ImageSets" / "Segmentation", root, root / "SegmentationClass"


def read_samples(root: Path, list_path: Path, need_masks: bool, faults: list | None = None) -> list[Sample]:
    """The samples of a split's list, in its order; a line's first word is an image's name.

    faults: takes the UserErrors of single lines; None: they are raised.
    Raises UserError for a missing folder, an empty list, a name of another form, an image that is not
    there and, with need_masks, a mask that is not there.
    """
    require_folder(root / "JPEGImages")
    return read_lines(list_path, lambda entry: _find(root, Path(entry[0]).name, list_path, need_masks), faults)


def _find(root: Path, line: str, list_path: Path, need_masks: bool) -> Sample:
    name = line.removesuffix(".jpg")
    match = _NAME.fullmatch(name)
    if match is None:
        raise UserError(f"{list_path}: {line!r} is no COCO image name such as COCO_train2014_000000000009")
    part, year, number = match.groups()
    image = _first(root / "JPEGImages", (part + year, part), (f"{name}.jpg",))
    if image is None:
        expected = root / "JPEGImages" / (part + year) / f"{name}.jpg"
        raise UserError(f"{expected}: image of {list_path} is missing")
    mask = _first(root / "SegmentationClass", (part + year, part), (f"{name}.png", f"{number}.png"))
    if need_masks and mask is None:
        expected = root / "SegmentationClass" / (part + year) / f"{name}.png"
        raise UserError(f"{expected}: mask of {list_path} is missing")
    return Sample(name, image, mask)


def _first(parent: Path, folders: tuple[str, ...], files: tuple[str, ...]) -> Path | None:
    """The first of the files that is there."""
    paths = (parent / folder / file for folder in folders for file in files)
    return next((path for path in paths if path.name in list_folder(path.parent)), None)
