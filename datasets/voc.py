"""The Pascal VOC layout on disk.

    ROOT/JPEGImages/NAME.jpg
    ROOT/SegmentationClassAug/NAME.png    or SegmentationClass/NAME.png
    ROOT/ImageSets/Segmentation/SPLIT.txt or ROOT/SPLIT.txt; a split may also be the path of a list file
"""

from pathlib import Path

from datasets.samples import Sample, list_folder, read_lines, require_folder
from utils.errors import UserError

CLASSES = (
    "aeroplane", "bicycle", "bird", "boat", "bottle", "bus", "car", "cat", "chair", "cow",
    "diningtable", "dog", "horse", "motorbike", "person", "pottedplant", "sheep", "sofa", "train", "tvmonitor",
)  # fmt: skip

MASK_FOLDERS = ("SegmentationClassAug", "SegmentationClass")


def list_folders(root: Path) -> tuple[Path, ...]:
    """Where split lists may lie, in the order of preference."""
    return root / "ImageSets" / "Segmentation", root


def read_samples(root: Path, list_path: Path, need_masks: bool, faults: list | None = None) -> list[Sample]:
    """The samples of a split's list, in its order. faults: takes the UserErrors of single lines; None: they are raised.

    A line of the list is a name, or '/JPEGImages/x.jpg' with or without '/SegmentationClassAug/x.png' behind it.
    Raises UserError for a missing folder, an empty list, another line, an image that is not there and,
    with need_masks, a mask that is not there.
    """
    require_folder(root / "JPEGImages")
    mask_folders = [root / folder for folder in MASK_FOLDERS if (root / folder).is_dir()]
    if need_masks and not mask_folders:
        raise UserError(f"{root}: masks are needed, but there is neither {MASK_FOLDERS[0]} nor {MASK_FOLDERS[1]}")

    def read(entry: list[str]) -> Sample:
        if len(entry) > 2 or any("/" not in path for path in entry[1:]):
            line = " ".join(entry)
            raise UserError(f"{list_path}: '{line}': expected one name, or the paths of an image and its mask")
        image = root / (entry[0].lstrip("/") if "/" in entry[0] else f"JPEGImages/{entry[0]}.jpg")
        if image.name not in list_folder(image.parent):
            raise UserError(f"{image}: image of {list_path} is missing")
        mask = _find_mask(root, image.stem, entry, mask_folders)
        if need_masks and mask is None:
            expected = root / entry[1].lstrip("/") if len(entry) > 1 else mask_folders[0] / f"{image.stem}.png"
            raise UserError(f"{expected}: mask of {list_path} is missing")
        return Sample(image.stem, image, mask)

    return read_lines(list_path, read, faults)


def _find_mask(root: Path, name: str, entry: list[str], folders: list[Path]) -> Path | None:
    """The mask of a line of the list: the one it names, else the first folder's that holds it, else None."""
    candidates = [root / entry[1].lstrip("/")] if len(entry) > 1 else [folder / f"{name}.png" for folder in folders]
    return next((path for path in candidates if path.name in list_folder(path.parent)), None)
