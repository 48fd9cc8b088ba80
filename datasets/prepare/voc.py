"""Makes a PASCAL VOC 2012 folder to train on from the official downloads: images, masks, lists, labels.

Masks are VOC's own where VOC has them, with the borders' 255, else SBD's. train_aug is VOC's train and all of SBD
without VOC's val, sorted: 10,582 images. An image's labels are the classes of all objects of its annotation, those
marked difficult too (docs/data.md says what that rests on).
"""

import argparse
import struct
import zlib
from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple

import numpy as np

from datasets.labels import annotated_classes, multi_hot
from datasets.onehot import read_onehot
from datasets.prepare import preparation
from datasets.prepare.mat import read_field
from datasets.prepare.preparation import Preparation, Task, image_task, list_task, to_json, train_command
from datasets.prepare.sources import Blob, Source
from datasets.samples import read_list
from datasets.texts import decoded, lines_of
from datasets.voc import CLASSES
from utils.errors import UserError, name_some
from utils.files import hash_of
from utils.images import check_same_size, label_png, read_label_map
from utils.progress import progress_bar

# images of the official lists; train_aug: VOC train and SBD without VOC val
KNOWN = {"train": 1464, "val": 1449, "trainval": 2913, "train_aug": 10582, "test": 1456}
LISTS = "ImageSets/Segmentation"
VOC_INNER, VOC_WANTED = ("VOCdevkit/VOC2012", "VOC2012"), ("JPEGImages", "Annotations", "SegmentationClass", LISTS)
SBD_INNER, SBD_WANTED = ("benchmark_RELEASE/dataset", "dataset", "SegmentationClassAug"), ("cls", ".")


class Parts(NamedTuple):
    """What the sources hold, by the images' names; lists by the splits' names."""

    images: dict[str, Blob]
    annotations: dict[str, Blob]
    masks: dict[str, Blob]
    sbd: dict[str, Blob]
    lists: dict[str, list[str]]


def read_parts(voc: list[Source], sbd: Source | None) -> Parts:
    """Raises UserError for broken archives, missing lists and masks that SBD's lists name and its folder lacks."""
    images, annotations, masks, lists = {}, {}, {}, {}
    for source in voc:
        images |= source.folder("JPEGImages", ".jpg")
        annotations |= source.folder("Annotations", ".xml")
        masks |= source.folder("SegmentationClass", ".png")
        lists |= {split: _names(blob) for split, blob in source.folder(LISTS, ".txt").items() if split in KNOWN}
    for split in ("train", "val"):
        if split not in lists:
            looked = ", ".join(str(source.path) for source in voc)
            raise UserError(f"{looked}: there is no {LISTS}/{split}.txt; --voc needs the trainval archive or folder")
    return Parts(images, annotations, masks, _sbd_masks(sbd) if sbd else {}, lists)


def _names(blob: Blob) -> list[str]:
    return [line.split()[0] for line in lines_of(decoded(blob.read(), blob))]


def _sbd_masks(sbd: Source) -> dict[str, Blob]:
    """By name: the .mat files that SBD's train and val lists name (all, where there are no lists), or PNGs."""
    mats, lists = sbd.folder("cls", ".mat"), sbd.folder(".", ".txt")
    if not mats:
        masks = sbd.folder(".", ".png")
        if not masks:
            raise UserError(f"{sbd.path}: neither dataset/cls/*.mat nor PNG masks are there")
        return masks
    listed = {name for split in ("train", "val") if split in lists for name in _names(lists[split])}
    missing = sorted(listed - set(mats))
    if missing:
        raise UserError(f"{sbd.path}: its lists name {name_some(missing)}, but dataset/cls has no such .mat")
    return {name: mats[name] for name in listed} if listed else mats


def augmented(train: list[str], val: list[str], sbd: Iterable[str]) -> list[str]:
    """train_aug: VOC's train and all of SBD (train and val), without VOC's val, sorted."""
    return sorted({*train, *sbd} - set(val))


def split_lists(parts: Parts, given: Path | None, partial: bool) -> dict[str, list[str]]:
    """The splits to write; train_aug is `given`'s, else computed.

    partial: other counts than the known are accepted, with a line that names them; else they raise UserError, as does
    an image that is named twice or in train_aug and val.
    """
    lists = {split: parts.lists[split] for split in ("train", "val", "test") if split in parts.lists}
    lists["trainval"] = sorted(lists["train"] + lists["val"])
    computed = augmented(lists["train"], lists["val"], parts.sbd)
    lists["train_aug"] = [Path(entry[0]).stem for entry in read_list(given)] if given else computed
    if given:
        _compare(given, lists["train_aug"], computed)
    for split, names in lists.items():
        if len(names) != KNOWN[split]:
            _wrong_count(split, names, parts, partial)
        if len(set(names)) != len(names):
            raise UserError(f"{split}: the list names an image twice")
    leaked = sorted(set(lists["train_aug"]) & set(lists["val"]))
    if leaked:
        raise UserError(f"{given}: holds images of VOC's val: {name_some(leaked)}")
    return lists


def _compare(given: Path, names: list[str], computed: list[str]) -> None:
    more, fewer = sorted(set(names) - set(computed)), sorted(set(computed) - set(names))
    if more or fewer:
        parts = [f"{word}: {name_some(found)}" for word, found in (("only here", more), ("left out", fewer)) if found]
        print(f"{given} differs from VOC train + SBD - VOC val by {len(more) + len(fewer)} images; {'; '.join(parts)}")


def _wrong_count(split: str, names: list[str], parts: Parts, partial: bool) -> None:
    difference = len(names) - KNOWN[split]
    made_of = f" (VOC train {len(parts.lists['train'])}, SBD {len(parts.sbd)})" if split == "train_aug" else ""
    line = f"{split} has {len(names)} images{made_of}, {abs(difference)} {'more' if difference > 0 else 'fewer'} than"
    if not partial:
        raise UserError(f"{line} the {KNOWN[split]} of the official list; --partial accepts that")
    print(f"{line} the official list")


def mask_bytes(mask: Blob, image: Blob) -> bytes:
    """A mask as a palette PNG of ids 0..20 and 255. Raises UserError where it is broken or of another size."""
    label_map = _read_mat(mask) if Path(mask.member or mask.path.name).suffix == ".mat" else _read_png(mask)
    check_same_size(image.image_size(), image, label_map, mask)
    return label_png(label_map)


def _read_png(mask: Blob) -> np.ndarray:
    return read_label_map(mask.open(), len(CLASSES) + 1)


def _read_mat(mask: Blob) -> np.ndarray:
    """GTcls.Segmentation of SBD: ids uint8 (H, W), 0 background."""
    try:
        label_map = read_field(mask.read(), "GTcls", "Segmentation")
    except KeyError:
        raise UserError(f"{mask}: holds no GTcls.Segmentation; masks are the files of SBD's dataset/cls") from None
    except (ValueError, TypeError, IndexError, struct.error, zlib.error, StopIteration) as error:
        raise UserError(f"{mask}: cannot be read ({error})") from None
    if label_map.ndim != 2 or label_map.dtype.kind not in "iu" or label_map.size == 0 or label_map.max() > len(CLASSES):
        raise UserError(f"{mask}: GTcls.Segmentation is no map of ids 0..{len(CLASSES)}")
    return label_map.astype(np.uint8)


def read_labels(names: list[str], annotations: dict[str, Blob]) -> dict[str, list[str]]:
    """The classes of every image, in the order of CLASSES. Raises UserError for a missing or broken annotation."""
    table = {}
    for name in progress_bar(names, "labels"):
        source = _of(annotations, name, "annotation Annotations/{}.xml")
        present = multi_hot(annotated_classes(source.open()), CLASSES, source, name)
        table[name] = [CLASSES[i] for i in np.flatnonzero(present)]
    return table


def compare_labels(table: dict[str, list[str]], path: Path) -> None:
    """Says which images have other labels in a released cls_labels_onehot.npy. Raises UserError for a broken one."""
    released = read_onehot(path)
    common = [name for name in table if name in released]
    differing = [name for name in common
                 if not np.array_equal(multi_hot(table[name], CLASSES, path, name), released[name])]
    equal = f"the labels of {len(common) - len(differing)} of {len(table)} images are equal"
    print(f"{path}: {equal}" + (f", others differ: {name_some(differing)}" if differing else ""))


def _of(files: dict[str, Blob], name: str, what: str) -> Blob:
    if name not in files:
        raise UserError(f"{what.format(name)} is missing in the sources")
    return files[name]


def plan(parts: Parts, lists: dict[str, list[str]], how: str) -> tuple[list, list, list[Task]]:
    """The tasks of images, of masks, and of the rest. Raises UserError for what a list names and no source has."""
    labelled = list(dict.fromkeys(lists["train_aug"] + lists["trainval"]))
    with_images = labelled + lists.get("test", [])
    images = {name: _of(parts.images, name, "image JPEGImages/{}.jpg") for name in with_images}
    masks = {name: _of(parts.sbd | parts.masks, name, "mask of {}") for name in labelled}
    rest = [list_task(split, names) for split, names in lists.items()]
    rest += [Task(f"Annotations/{name}.xml", parts.annotations[name].read) for name in labelled]
    return (
        [image_task(f"JPEGImages/{name}.jpg", blob, how) for name, blob in images.items()],
        [Task(f"SegmentationClassAug/{name}.png", mask_bytes, (blob, images[name])) for name, blob in masks.items()],
        rest,
    )


def prepare(options: argparse.Namespace) -> None:
    """Makes or verifies the folder; options: those of tools/prepare_voc.py. Raises UserError."""
    if options.verify:
        preparation.verify(options.out, options.workers)
        return
    if not options.voc:
        raise UserError("--voc is missing: give VOCtrainval_11-May-2012.tar or the unpacked VOCdevkit")
    voc = [Source(path, VOC_INNER, VOC_WANTED, options.out) for path in options.voc]
    sbd = Source(options.sbd, SBD_INNER, SBD_WANTED, options.out) if options.sbd else None
    sources = {f"voc {k}": source for k, source in enumerate(voc, 1)} | ({"sbd": sbd} if sbd else {})
    if options.train_aug:
        sources["train_aug"] = hash_of(options.train_aug)
    settings = {"images": options.images, "partial": options.partial}
    with Preparation(options.out, preparation.identity("prepare_voc", settings, sources)) as work:
        if not options.compare_labels and work.complete(options.workers):
            print(f"{options.out}: everything is there already")
            return
        parts = read_parts(voc, sbd)
        lists = split_lists(parts, options.train_aug, options.partial)
        labels = read_labels(list(dict.fromkeys(lists["train_aug"] + lists["trainval"])), parts.annotations)
        if options.compare_labels:
            compare_labels(labels, options.compare_labels)
        images, masks, rest = plan(parts, lists, options.images)
        work.make(images, options.workers, "images")
        work.make(masks, options.workers, "masks")
        work.make([*rest, Task("labels.json", to_json, (labels,))], options.workers, "annotations, lists")
        counts = {split: len(names) for split, names in lists.items()}
        work.finish(counts, [*options.voc, *([options.sbd] if options.sbd else [])])
    shown = ", ".join(f"{split} {count}" for split, count in counts.items())
    print(f"{options.out}: {shown}\nto train: {train_command('train_voc.py', 'voc', [f'data.root={options.out}'])}")
