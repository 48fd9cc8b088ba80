"""Makes a folder to train on from your own images, a table of their classes and, if there are any, masks.

Writes the VOC layout: JPEGImages, SegmentationClassAug, ImageSets/Segmentation/{train,val}.txt, labels.json, and
classes.txt; prints the command that trains on it.
"""

import argparse
import csv
import io
import json
import random
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

from datasets import agreement
from datasets.classes import BACKGROUND, IGNORED, class_list, reserved
from datasets.files import files_below
from datasets.labels import read_named_classes
from datasets.prepare import preparation
from datasets.prepare.preparation import Preparation, Task, image_task, list_task, to_json, train_command
from datasets.prepare.sources import Blob, digest_of_listing
from datasets.samples import read_list, refuse_twice
from datasets.texts import read_json, read_text
from utils.errors import UserError, did_you_mean, name_some
from utils.files import hash_of
from utils.images import IGNORE, check_same_size, label_png, read_ids, read_label_map, read_rgb

IMAGES = (".jpg", ".jpeg", ".png", ".bmp", ".tif", ".tiff", ".webp")
MOST_CLASSES = 254
HEADINGS = ("image", "images", "image_id", "file", "filename", "file_name", "name", "path")   # of the images
LISTS = ("class", "classes", "label", "labels", "category", "categories")   # headings of names, not of 0 and 1
PRESENT, ABSENT = ("1", "1.0", "true"), ("0", "0.0", "false")
VALUE = re.compile(r"[-+\d.,]+|true|false|yes|no|[xyn]", re.IGNORECASE)   # what is no name in a CSV
MISSING = re.compile(r"nan|n/?a|none|null|unknown|\?|-.*", re.IGNORECASE)   # what stands where there is nothing to say
VAL_SHARE = 0.1


class Row(NamedTuple):
    """A line of the table: where it stands, what it calls the image, the classes; columns: all that a table of 0 and 1
    has, in their order."""

    where: str
    image: str
    classes: list[str]
    columns: Sequence[str] = ()


def find_files(folder: Path, suffixes: tuple[str, ...], what: str) -> dict[str, Path]:
    """By the stem. Raises UserError where there are none, two of one stem, one with white space, a link to nothing."""
    if not folder.is_dir():
        raise UserError(f"{folder}: no such folder (--{what})")
    found: dict[str, Path] = {}
    for path in files_below(folder, suffixes):
        if not path.exists():
            raise UserError(f"{path}: is a link to nothing; mend or remove it")
        if path.stem.split() != [path.stem] or not path.stem.isprintable():
            raise UserError(f"{path}: white space or unprintable in a name cannot stand in a split list; rename it")
        if path.stem in found:
            raise UserError(f"{path} and {found[path.stem]} have the same name {path.stem!r}; rename one")
        found[path.stem] = path
    if not found:
        raise UserError(f"{folder}: no files ending in {', '.join(suffixes)} (--{what})")
    return found


def read_rows(path: Path) -> Iterator[Row]:
    """The rows of a CSV or JSON table. Raises UserError naming the line."""
    return _json_rows(path) if path.suffix.lower() == ".json" else _csv_rows(path)


def _csv_rows(path: Path) -> Iterator[Row]:
    rows = list(_rows_of_cells(path))
    of_values = any(VALUE.fullmatch(cell) for row in rows[1:] for cell in row.classes)
    columns = rows[0].classes if of_values else []
    if len({*columns}) < len(columns) or any(VALUE.fullmatch(name) or name.lower() in LISTS for name in columns):
        raise UserError(f"{path}: values such as 0 and 1 need a first row with the names of the classes, all different")
    has_heading = columns or (rows and rows[0].image.lower() in HEADINGS)
    for name in rows[0].classes if has_heading and not columns else ():
        if name.lower().rstrip("0123456789_ ") not in ("", *LISTS):
            raise UserError(f"{rows[0].where}: column {name!r}: classes stand under 'class'; leave out other columns")
    for row in rows[1:] if has_heading else rows:
        if not row.image:
            raise UserError(f"{row.where}: no image in the first column")
        yield row._replace(classes=_of_values(row, columns) if columns else _of_names(row), columns=columns)


def _rows_of_cells(path: Path) -> Iterator[Row]:
    """Rows that hold anything, with cells for classes; cells are apart by what comes first of commas, ; and tabs."""
    text = read_text(path)
    first = re.match(r'\s*(?:"[^"]*"|[^,;\t\n"])*([,;\t])', text)
    reader = csv.reader(io.StringIO(text), delimiter=first[1] if first else ",", skipinitialspace=True, strict=True)
    try:
        for cells in reader:
            if any(cells := [cell.strip() for cell in cells]):
                yield Row(f"{path}, line {reader.line_num}", cells[0], cells[1:])
    except csv.Error as error:
        raise UserError(f"{path}, line {reader.line_num}: cannot be read ({error})") from None


def _of_values(row: Row, columns: list[str]) -> list[str]:
    """The columns of 1."""
    if len(row.classes) != len(columns):
        raise UserError(f"{row.where}: {len(row.classes)} values, but {len(columns)} classes in the first row")
    pairs = list(zip(columns, (value.lower() for value in row.classes), strict=True))
    for name, value in pairs:
        if value not in (*PRESENT, *ABSENT):
            raise UserError(f"{row.where}: {value!r} in the column {name}: expected 1 or 0")
    return [name for name, value in pairs if value in PRESENT]


def _of_names(row: Row) -> list[str]:
    classes = [name.strip() for cell in row.classes for name in cell.split(";") if name.strip()]
    if not classes:
        raise UserError(f"{row.where}: image {row.image} has no class; write {BACKGROUND} where it shows none")
    for name in classes:
        if set(",|") & {*name} or VALUE.fullmatch(name) or MISSING.fullmatch(name):
            raise UserError(f"{row.where}: {name!r} is no class; names in one cell are apart by ;")
    return classes


def _json_rows(path: Path) -> Iterator[Row]:
    for image, classes in read_named_classes(path).items():
        yield Row(f"{path}, image {image}", image, [name.strip() for name in classes])


def read_table(
    path: Path, folder: Path, images: dict[str, Path], classes: list[str] | None
) -> tuple[dict[str, list[str]], list[str]]:
    """The classes of every image, by its stem; and `classes`, those of the table where it is None.

    Raises UserError for unknown images and classes, naming the line, and for images without a row.
    """
    stems = _ways_to_say(folder, images)
    table: dict[str, list[str]] = {}
    columns: Sequence[str] = ()
    for row in read_rows(path):
        columns = row.columns
        if row.image not in stems:
            raise UserError(f"{row.where}: {folder} has no image {row.image!r}{did_you_mean(row.image, stems)}")
        present = table.setdefault(stems[row.image], [])
        for name in row.classes:
            if reserved(name) == BACKGROUND:
                continue
            if classes is not None and name not in classes:
                raise UserError(f"{row.where}: unknown class {name!r}{did_you_mean(name, classes)}")
            if name not in present:
                present.append(name)
    missing = sorted(set(images) - set(table))
    if missing:
        raise UserError(f"{path}: no classes of {len(missing)} images: {name_some(str(images[m]) for m in missing)}")
    if classes is None:
        named = [name for name in columns if reserved(name) != BACKGROUND]
        classes = list(class_list(named or sorted({name for names in table.values() for name in names}), path))
    return table, classes


def _ways_to_say(folder: Path, images: dict[str, Path]) -> dict[str, str]:
    """Path below the folder, file name and stem -> stem."""
    ways: dict[str, str] = {}
    for stem, path in images.items():
        for way in (stem, path.name, path.relative_to(folder).as_posix()):
            if ways.setdefault(way, stem) != stem:
                raise UserError(f"{path} and {images[ways[way]]} are both known as {way!r}; rename one")
    return ways


def parse_classes(text: str | None) -> list[str] | None:
    """--classes; raises UserError as `class_list` does."""
    return None if text is None else list(class_list(text.split(","), f"--classes {text}"))


def parse_ids(text: str | None) -> dict[int, str] | None:
    """--ids: what each id of the masks means. Raises UserError."""
    if text is None:
        return None
    try:
        if text.endswith(".json"):
            pairs = read_json(Path(text)).items()
        else:
            pairs = [part.split("=", 1) for part in text.split(",")]
        ids = {int(number): reserved(str(name)) or str(name).strip() for number, name in pairs}
    except (ValueError, AttributeError) as error:
        raise UserError(f"--ids {text}: expected ID=CLASS,... or a JSON file of such pairs ({error})") from None
    if len(ids) != len(list(pairs)) or not all(ids.values()):
        raise UserError(f"--ids {text}: an id is named twice, or has no class")
    return ids


def choose_classes(classes: list[str] | None, ids: dict[int, str] | None, has_masks: bool) -> list[str] | None:
    """The classes in the order of their ids; None where the table is to tell. Raises UserError."""
    if ids is not None:
        meant = list(dict.fromkeys(name for name in ids.values() if name not in (BACKGROUND, IGNORED)))
        unknown = [name for name in meant if classes is not None and name not in classes]
        if unknown:
            raise UserError(f"--ids names {name_some(unknown)}, which --classes does not")
        return classes or list(class_list(meant, "--ids"))
    if has_masks and classes is None:
        raise UserError("--masks needs --classes in the order of the masks' ids 1, 2, ..., or --ids")
    return classes


def check_image(image: Blob) -> None:
    """Raises UserError, naming the file, where it cannot be trained on."""
    read_rgb(image.open())


def mask_bytes(mask: Blob, image: Blob, lookup: dict[int, int] | None, num_ids: int) -> bytes:
    """The mask with the ids of the project. lookup: id of the mask -> id; None: as they are, below num_ids or 255.

    Raises UserError for an id without meaning and another size than the image's.
    """
    label_map = read_label_map(mask.open(), num_ids) if lookup is None else _translate(mask, lookup)
    check_same_size(image.image_size(), image, label_map, mask)
    return label_png(label_map)


def _translate(mask: Blob, lookup: dict[int, int]) -> np.ndarray:
    """Ids uint8 (H, W) of a mask with ids of any kind."""
    values = read_ids(mask.open())
    present, places = np.unique(values, return_inverse=True)
    unknown = [int(number) for number in present if int(number) not in lookup]
    if unknown:
        raise UserError(f"{mask}: holds the id {unknown[0]}, which --ids does not name")
    return np.array([lookup[int(number)] for number in present], np.uint8)[places].reshape(values.shape)


def split_names(options: argparse.Namespace, ways: dict[str, str], masks: dict[str, Path]) -> dict[str, list[str]]:
    """The stems of train and val, sorted or as the lists say; val is left out where it is empty. Raises UserError."""
    if options.train_list or options.val_list:
        if not (options.train_list and options.val_list):
            raise UserError("--train-list and --val-list go together")
        lists = {"train": _named(options.train_list, ways), "val": _named(options.val_list, ways)}
        bare = [name for name in lists["val"] if name not in masks]
        if bare:
            raise UserError(f"{options.val_list}: validation needs masks; none of {name_some(bare)}")
        both = sorted(set(lists["train"]) & set(lists["val"]))
        if both:
            raise UserError(f"{options.val_list}: images of the training list: {name_some(both)}")
        return lists
    stems, scorable = sorted(set(ways.values())), sorted(masks)
    share = options.val_share if options.val_share is not None else VAL_SHARE
    if options.val_share and not masks:
        raise UserError(f"--val-share {options.val_share}: validation needs --masks")
    count = min(round(share * len(stems)), len(scorable)) if masks else 0
    val = sorted(random.Random(options.seed).sample(scorable, count))
    lists = {"train": sorted(set(stems) - set(val)), "val": val}
    if not lists["train"]:
        raise UserError(f"--val-share {share} leaves no image to train on")
    return {split: names for split, names in lists.items() if names}


def _named(path: Path, ways: dict[str, str]) -> list[str]:
    names = [entry[0] for entry in read_list(path)]
    unknown = [name for name in names if name not in ways]
    if unknown:
        raise UserError(f"{path}: no such images: {name_some(unknown)}")
    refuse_twice([ways[name] for name in names], names, path)
    return [ways[name] for name in names]


def prepare(options: argparse.Namespace) -> None:
    """Makes or verifies the folder; options: those of tools/prepare_folder.py. Raises UserError."""
    if options.verify:
        preparation.verify(options.out, options.workers)
        return
    if not options.images or not options.labels:
        raise UserError("--images FOLDER and --labels FILE are needed (or --verify)")
    for source in filter(None, (options.images, options.masks)):
        if options.out.resolve().is_relative_to(source.resolve()):
            raise UserError(f"{options.out}: lies in {source}, and its files would be found again; give another folder")
    ids = parse_ids(options.ids)
    classes = choose_classes(parse_classes(options.classes), ids, options.masks is not None)
    images = find_files(options.images, IMAGES, "images")
    masks = find_files(options.masks, (".png",), "masks") if options.masks else {}
    table, classes = read_table(options.labels, options.images, images, classes)
    if masks and not masks.keys() & images.keys():
        raise UserError(f"{options.masks}: no mask has the name of an image, such as {next(iter(images))}.png")
    if len(classes) > MOST_CLASSES:
        raise UserError(f"{options.labels}: {len(classes)} classes; 1 to {MOST_CLASSES} fit into a mask")
    lists = split_names(options, _ways_to_say(options.images, images), {s: masks[s] for s in masks if s in images})
    with Preparation(options.out, _identity(options, images, masks, ids, classes, lists)) as work:
        if work.complete(options.workers):
            print(f"{options.out}: everything is there already")
        else:
            _make(work, options, images, masks, _lookup(ids, classes), classes, lists, table)
    print(_command(options.out, classes, "val" in lists))


def _identity(options: argparse.Namespace, images, masks, ids, classes, lists) -> dict:
    settings = {"link": options.link, "ids": ids and {str(k): v for k, v in ids.items()}, "classes": classes,
                "lists": lists}
    sources = {"images": digest_of_listing({s: Blob(p) for s, p in images.items()}), "labels": hash_of(options.labels)}
    if masks:
        sources["masks"] = digest_of_listing({s: Blob(p) for s, p in masks.items()})
    return preparation.identity("prepare_folder", settings, sources)


def _lookup(ids: dict[int, str] | None, classes: list[str]) -> dict[int, int] | None:
    numbers = {BACKGROUND: 0, IGNORED: IGNORE, **{name: k for k, name in enumerate(classes, 1)}}
    return ids and {number: numbers[name] for number, name in ids.items()}


def _make(work: Preparation, options: argparse.Namespace, images, masks, lookup, classes, lists, table) -> None:
    blobs = {stem: Blob(path) for stem, path in images.items()}
    list(preparation.parallel(check_image, blobs.values(), options.workers, "check images", len(blobs)))
    names = {stem: _name_of(path) for stem, path in images.items()}
    how = "link" if options.link else "copy"
    work.make([image_task(names[stem], blob, how) for stem, blob in blobs.items()], options.workers, "images")
    arguments = {stem: (Blob(masks[stem]), blobs[stem], lookup, len(classes) + 1) for stem in masks if stem in blobs}
    work.make([Task(f"SegmentationClassAug/{stem}.png", mask_bytes, given) for stem, given in arguments.items()],
              options.workers, "masks")
    _compare(work.root, {stem: masks[stem] for stem in arguments}, table, classes, options.workers)
    rest = [list_task(split, [_line(names[stem]) for stem in stems]) for split, stems in lists.items()]
    rest += [Task("labels.json", to_json, (table,)), Task("classes.txt", str.encode, ("\n".join(classes) + "\n",))]
    work.make(rest, options.workers, "lists")
    counts = {split: len(stems) for split, stems in lists.items()} | {"masks": len(arguments)}
    work.finish(counts, [path for path in (options.images, options.labels, options.masks) if path])
    unused = len(masks) - len(arguments)
    print(f"{options.out}: " + ", ".join(f"{part} {count}" for part, count in counts.items())
          + (f"; {unused} masks have no image" if unused else ""))


def _compare(root: Path, masks: dict[str, Path], table: dict[str, list[str]], classes: list[str], workers: int) -> None:
    """Says where the masks, as they were written, and the table differ. Raises UserError where most do."""
    written = [root / f"SegmentationClassAug/{stem}.png" for stem in masks]
    ids = preparation.parallel(agreement.ids_in, written, workers, "compare with labels", len(masks))
    labels = ({classes.index(name) + 1 for name in table[stem]} for stem in masks)
    note = agreement.compare(zip(masks.values(), labels, ids, strict=True), classes)
    if note:
        print(note)


def _name_of(path: Path) -> str:
    """JPEGs end in .jpg, as the VOC layout has it; other formats keep their ending."""
    suffix = path.suffix.lower()
    return f"JPEGImages/{path.stem}{'.jpg' if suffix == '.jpeg' else suffix}"


def _line(name: str) -> str:
    """A line of a split list: the bare name, but for images of another format the path."""
    path = Path(name)
    return path.stem if path.suffix == ".jpg" else f"/{name}"


def _command(out: Path, classes: list[str], validated: bool) -> str:
    listed = "data.classes=" + json.dumps(classes, ensure_ascii=False)
    settings = [f"data.root={out}", listed, "data.train_split=train",
                "data.val_split=val" if validated else "data.val_split=null"]
    command = train_command("train_voc.py", out.resolve().name, settings)
    note = "" if validated else "  (no masks: trains without validation)"
    return f"to train{note}:\n{command}"
