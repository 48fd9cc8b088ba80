"""Makes an MS COCO 2014 folder to train on from the official annotations: masks, lists, labels, images.

Masks are palette PNGs of the ids 1..80, the 80 categories in the order of their COCO ids (1 person ... 90 toothbrush).
Where annotations overlap, the one of the smaller `area` is in front, of two of the same area the first in the file;
crowds are drawn like all others by their area. So does coco2voc (github.com/alicranck/coco2voc), which ToCo's
README names. COCO-Stuff's converter draws in the order of the file and leaves crowds out.

train and val are the images with an annotation, sorted: 82,081 and 40,137. val_part is the first 5,000 of val.
"""

import argparse
import contextlib
import io
from pathlib import Path
from typing import NamedTuple

import numpy as np
from pycocotools import mask as rle
from pycocotools.coco import COCO

from datasets.coco import CLASSES
from datasets.labels import labels_of_mask
from datasets.prepare import preparation
from datasets.prepare.preparation import Preparation, Task, image_task, list_task, to_json, train_command
from datasets.prepare.sources import Blob, Source
from utils.errors import UserError, name_some
from utils.files import hash_of
from utils.images import label_png, read_label_map

SPLITS = ("train", "val")
VAL_PART = 5000
LONGEST = 65535   # side of an image, pixels: the most of a JPEG
KNOWN = {"train": 82081, "val": 40137}


class Shape(NamedTuple):
    """An annotation: its COCO id, class 1..80, area in pixels, and polygons or RLE as the file holds them."""

    annotation: int
    label: int
    area: float
    segmentation: list | dict


class Picture(NamedTuple):
    """An image and its annotations, in the order of the file."""

    name: str
    height: int
    width: int
    shapes: list[Shape]


def read_pictures(path: Path) -> list[Picture]:
    """The images with an annotation, by name. Raises UserError for a broken file or other categories than COCO's 80."""
    try:
        with contextlib.redirect_stdout(io.StringIO()):  # pycocotools reports its own progress
            coco = COCO(str(path))
        ids = _class_ids(coco, path)
        pictures = [_picture(coco, image, ids) for image in coco.imgs.values() if coco.imgToAnns.get(image["id"])]
    except (ValueError, KeyError, TypeError, AttributeError, AssertionError, RecursionError, MemoryError) as error:
        raise UserError(f"{path}: not a file of COCO instances ({error!r})") from None
    if not pictures:
        raise UserError(f"{path}: holds no images with annotations")
    return sorted(pictures, key=lambda picture: picture.name)


def _class_ids(coco: COCO, path: Path) -> dict[int, int]:
    """COCO category id -> class 1..80. Raises UserError unless the categories are those of datasets/coco.py."""
    names = {number: coco.cats[number]["name"] for number in sorted(coco.cats)}
    if tuple(names.values()) != CLASSES:
        pairs = zip([*names.values(), None], [*CLASSES, None], strict=False)
        found, expected = next((pair for pair in pairs if pair[0] != pair[1]), (len(names), len(CLASSES)))
        raise UserError(f"{path}: its categories are not COCO's 80: {found!r} stands where {expected!r} is expected")
    return {number: label for label, number in enumerate(names, 1)}


def _picture(coco: COCO, image: dict, ids: dict[int, int]) -> Picture:
    shapes = [Shape(a["id"], ids[a["category_id"]], a["area"], a["segmentation"]) for a in coco.imgToAnns[image["id"]]]
    name, sides = Path(image["file_name"]).stem, (image["height"], image["width"])
    sound = name.split() == [name] and name.isprintable()   # as a list and a file need it
    if not sound or not all(type(side) is int and 0 < side <= LONGEST for side in sides):
        raise ValueError(f"image {name!r} of {sides[1]!r}x{sides[0]!r}")
    return Picture(name, *sides, shapes)


def rasterise(picture: Picture) -> np.ndarray:
    """The label map uint8 (H, W), smaller areas in front. Raises UserError naming a broken annotation."""
    label_map = np.zeros((picture.height, picture.width), np.uint8)
    front_first = sorted(picture.shapes, key=lambda shape: shape.area)
    for shape in reversed(front_first):
        label_map[_mask(shape, picture)] = shape.label
    return label_map


def _mask(shape: Shape, picture: Picture) -> np.ndarray:
    """Bool (H, W)."""
    encoded = shape.segmentation
    try:
        if isinstance(encoded, list):
            encoded = rle.merge(rle.frPyObjects(encoded, picture.height, picture.width))
        elif isinstance(encoded["counts"], list):
            encoded = rle.frPyObjects(encoded, picture.height, picture.width)
        mask = rle.decode(encoded).astype(bool)
    except Exception as error:  # pycocotools raises plain Exceptions
        raise UserError(f"annotation {shape.annotation} of {picture.name} cannot be rasterised ({error})") from None
    if mask.shape != (picture.height, picture.width):
        raise UserError(f"annotation {shape.annotation} of {picture.name} is of another size than its image")
    return mask


def mask_bytes(picture: Picture, image: Blob | None) -> bytes:
    """The mask as a palette PNG. Raises UserError where the image is there and of another size."""
    if image is not None and (size := image.image_size()) != (picture.height, picture.width):
        raise UserError(f"{image} is {size[1]}x{size[0]}, but its annotations are {picture.width}x{picture.height}")
    return label_png(rasterise(picture))


def annotated(pictures: list[Picture]) -> dict[str, list[str]]:
    """The classes of each image's annotations, crowds and covered objects too."""
    return {picture.name: [CLASSES[k - 1] for k in sorted({shape.label for shape in picture.shapes})]
            for picture in pictures}


def visible(path: Path) -> list[str]:
    """The classes in a mask."""
    labels = labels_of_mask(read_label_map(path, len(CLASSES) + 1), len(CLASSES))
    return [CLASSES[i] for i in labels.nonzero()[:, 0].tolist()]


def prepare(options: argparse.Namespace) -> None:
    """Makes or verifies the folder; options: those of tools/prepare_coco.py. Raises UserError."""
    if options.verify:
        preparation.verify(options.out, options.workers)
        return
    files = {split: _annotation_file(options, split) for split in SPLITS}
    sources = {split: hash_of(path) for split, path in files.items()}
    folders = {} if options.images == "leave" else {split: _image_source(options, split) for split in SPLITS}
    sources |= {f"images of {split}": source for split, source in folders.items()}
    foreign = ("JPEGImages",) if options.images == "leave" else ()
    wanted = preparation.identity("prepare_coco", {"images": options.images}, sources)
    with Preparation(options.out, wanted, foreign) as work:
        if work.complete(options.workers):
            print(f"{options.out}: everything is there already")
            return
        pictures = {split: read_pictures(path) for split, path in files.items()}
        for split in SPLITS:
            _make_split(work, split, pictures[split], folders.get(split), options)
        lists = {split: [picture.name for picture in pictures[split]] for split in SPLITS}
        lists["val_part"] = lists["val"][:VAL_PART]
        _make_rest(work, lists, annotated(pictures["train"] + pictures["val"]), options.workers)
        counts = {split: len(names) for split, names in lists.items()}
        work.finish(counts, [*files.values(), *(folder.path for folder in folders.values())])
    _report(options.out, counts)


def _annotation_file(options: argparse.Namespace, split: str) -> Path:
    if options.annotations is None:
        raise UserError("--annotations is missing: give the folder of instances_{train,val}2014.json")
    path = options.annotations / f"instances_{split}2014.json"
    if not path.is_file():
        raise UserError(f"{path}: no such file (--annotations)")
    return path


def _image_source(options: argparse.Namespace, split: str) -> Source:
    if options.image_folder is None:
        raise UserError("--image-folder is missing: give the folder of train2014/ and val2014/, or --images leave")
    return Source(options.image_folder / f"{split}2014", (), (".",), options.out)


def _make_split(
    work: Preparation, split: str, pictures: list[Picture], source: Source | None, options: argparse.Namespace
) -> None:
    images = source.folder(".", ".jpg") if source else {}
    missing = [picture.name for picture in pictures if picture.name not in images]
    if source and missing:
        raise UserError(f"{source.path}: {len(missing)} annotated images are missing: {name_some(missing)}")
    if source:
        names = {f"JPEGImages/{split}2014/{picture.name}.jpg": images[picture.name] for picture in pictures}
        work.make([image_task(name, blob, options.images) for name, blob in names.items()], options.workers,
                  f"{split} images")
    masks = [Task(f"SegmentationClass/{split}2014/{picture.name}.png", mask_bytes, (picture, images.get(picture.name)))
             for picture in pictures]
    work.make(masks, options.workers, f"{split} masks")


def _make_rest(work: Preparation, lists: dict[str, list[str]], of_annotations: dict, workers: int) -> None:
    """Lists and both label files; labels.json holds the classes one can see in the masks."""
    paths = [work.root / f"SegmentationClass/{split}2014/{name}.png" for split in SPLITS for name in lists[split]]
    seen = preparation.parallel(visible, paths, workers, "labels", len(paths))
    of_masks = {path.stem: classes for path, classes in zip(paths, seen, strict=True)}
    differing = [name for name in of_masks if of_masks[name] != of_annotations[name]]
    print(f"{len(differing)} images have a class in their annotations alone (covered, or smaller than a pixel): "
          "labels.json is of the masks, labels_annotations.json of the annotations")
    tasks = [list_task(split, names) for split, names in lists.items()]
    tasks += [Task("labels.json", to_json, (of_masks,)), Task("labels_annotations.json", to_json, (of_annotations,))]
    work.make(tasks, workers, "lists")


def _report(out: Path, counts: dict[str, int]) -> None:
    print(f"{out}: " + ", ".join(f"{split} {count}" for split, count in counts.items()))
    for split, known in KNOWN.items():
        if counts[split] != known:
            print(f"{split} has {counts[split]} annotated images, COCO 2014 has {known}")
    print(f"to train: {train_command('train_coco.py', 'coco', [f'data.root={out}'])}")
