"""The archive that the PASCAL VOC 2012 segmentation server takes, made of label PNGs or of a checkpoint."""

import gzip
import io
import tarfile
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from PIL import Image

from datasets import EvalItem, ImageSet, build_image_set
from datasets.samples import Sample
from datasets.voc import CLASSES
from engine.checkpoints.files import check_classes
from engine.config import load_config
from engine.inference.batch import Prediction
from engine.inference.plan import row_name
from engine.inference.prediction_folder import Predictor
from utils.errors import UserError
from utils.files import replacing
from utils.images import IGNORE, label_png, read_label_map, write_label_png
from utils.progress import progress_bar

COMPETITIONS = ("comp5", "comp6")
TEST_IMAGES = 1456   # VOC 2012 segmentation, test


def data_settings(root: str) -> list[str]:
    """The key=value pairs of the test images below `root`, whose image labels nobody has; 4 pixels of a class as
    released for them."""
    return ["data.name=voc", f"data.root={root}", "evaluate.image_labels=predicted", "evaluate.min_pixels=4"]


def images_to_submit(root: str, split: str) -> ImageSet:
    """The images to submit. Raises UserError where the list or an image is not there."""
    return build_image_set(load_config(None, data_settings(root)), split)


def predict_masks(predictor: Predictor, folder: Path, split: str, overwrite: bool) -> str:
    """Fills a folder with the label PNGs of a checkpoint, by the last row of its plan; returns a line that says so."""
    dataset, row = predictor.images_of(split), predictor.plan.rows[-1]
    check_classes(predictor.file, CLASSES)
    is_done = predictor.claim(folder, overwrite, {"images": dataset.identity()})

    def write(item: EvalItem, prediction: Prediction) -> None:
        write_label_png(folder / f"{item.name}.png", prediction.labels[row])

    done = predictor.write(dataset, write, lambda name: is_done(folder / f"{name}.png"), "predict")
    return f"{folder}: {row_name(row)} of {len(dataset)} images, {done.written} now, {done.seconds:.1f} s"


def write_archive(output: Path, masks: Path, samples: Sequence[Sample], competition: str) -> None:
    """Packs MASKS/NAME.png of every sample into the .tgz `output`, and reads it back before it bears that name.

    In it lies results/VOC2012/Segmentation/COMPETITION_test_cls/NAME.png, ids 0..20 in the VOC palette. The bytes
    depend on the ids alone. Raises UserError naming the first file that is missing, of no image, of another size than
    its image's, no palette PNG, or with an id that is none.
    """
    names = sorted(sample.name for sample in samples)
    check_names(masks, names)
    folder = f"results/VOC2012/Segmentation/{competition}_test_cls"
    sizes = {}
    with replacing(output) as part:
        with (
            open(part, "wb") as raw,
            gzip.GzipFile("", "wb", fileobj=raw, mtime=0) as packed,
            tarfile.open(fileobj=packed, mode="w", format=tarfile.USTAR_FORMAT) as archive,
        ):
            by_name = sorted(samples, key=lambda sample: sample.name)
            for sample in progress_bar(by_name, "pack", unit="image"):
                ids = read_mask(masks / f"{sample.name}.png", sample.image)
                member = f"{folder}/{sample.name}.png"
                sizes[member] = ids.shape[::-1]
                _add(archive, member, label_png(ids))
        check_archive(part, sizes)


def check_names(masks: Path, names: Sequence[str]) -> None:
    """Raises UserError unless the PNGs of a folder are those of the names."""
    if not masks.is_dir():
        raise UserError(f"{masks}: no such folder of label PNGs")
    there = {path.stem for path in masks.glob("*.png")}
    missing, extra = sorted(set(names) - there), sorted(there - set(names))
    if missing:
        raise UserError(f"{masks / missing[0]}.png is missing ({len(missing)} of {len(names)} are)")
    if extra:
        raise UserError(f"{masks / extra[0]}.png: the list has no such image ({len(extra)} files too many)")


def read_mask(path: Path, image: Path) -> np.ndarray:
    """The ids uint8 (H, W) of a palette PNG, 0..20, of its image's size. Raises UserError for any other file."""
    ids = read_label_map(path, len(CLASSES) + 1)
    with Image.open(path) as mask, Image.open(image) as picture:
        if (mask.format, mask.mode) != ("PNG", "P"):
            raise UserError(f"{path}: {mask.format} of mode {mask.mode}, the server takes palette PNGs (mode P)")
        if mask.size != picture.size:
            raise UserError("{}: is {}x{}, but its image is {}x{}".format(path, *mask.size, *picture.size))
    if (ids == IGNORE).any():
        raise UserError(f"{path}: holds id {IGNORE}, the server takes 0..{len(CLASSES)} only")
    return ids


def check_archive(path: Path, sizes: dict[str, tuple[int, int]]) -> None:
    """Reads an archive back. Raises UserError unless it has these members alone, palette PNGs of these (W, H)."""
    try:
        with tarfile.open(path, "r:gz") as archive:
            members = archive.getmembers()
            if [member.name for member in members] != list(sizes):
                raise UserError(f"{path}: the archive's members are not those that were written")
            for member in members:
                with Image.open(archive.extractfile(member)) as image:
                    if image.mode != "P" or image.size != sizes[member.name] or image.getextrema()[1] > len(CLASSES):
                        raise UserError(f"{path}: {member.name} came back other than it was written")
    except (tarfile.TarError, OSError, EOFError) as error:
        raise UserError(f"{path}: the archive cannot be read back ({error}); is the disk full?") from None


def _add(archive: tarfile.TarFile, name: str, content: bytes) -> None:
    info = tarfile.TarInfo(name)   # no owner, time 0
    info.size, info.mode = len(content), 0o644
    archive.addfile(info, io.BytesIO(content))
