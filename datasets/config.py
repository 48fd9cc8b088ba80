"""The keys of `data`."""

from typing import Literal

from pydantic import model_validator

from datasets.classes import class_list
from utils.errors import UserError
from utils.schema import Count, FilePath, Index, Positive, Section, Text, key


class Shapes(Section):
    """Of generated shapes (data.name=shapes): images a split, side in pixels."""

    seed: Index = key(0, "ours")
    train: int = key(2000, "ours")
    val: int = key(200, "ours")
    size: int = key(128, "ours")


class Data(Section):
    name: Literal["voc", "coco", "shapes"] = key("voc", "ours: the layout of the folder")
    root: FilePath | None = key(None, "ours: the folder, or the environment variable VOC_ROOT or COCO_ROOT")
    train_split: FilePath = key("train_aug", "paper: 10,582 images")
    val_split: FilePath | None = key("val", "paper: 1,449 images; null: train without validation")
    image_labels: FilePath | None = key(None, "ours: file or folder, or masks; null: the data set's own")
    masks: FilePath | None = key(
        None, "ours: to learn from: a folder of NAME.png, or of irn's NAME.npy, cut at evaluate.bkg; or own: the data "
        "set's; null: none"
    )
    classes: tuple[Text, ...] | None = key(None, "ours: names without background; null: the data set's own")
    augmentation: Literal["resized_crop", "scale_and_pad", "scale_flip_crop", "long_side_crop", "scale_crop"] = key(
        "resized_crop", "code of MoRe on VOC; scale_and_pad: on COCO; scale_flip_crop: of AFA; long_side_crop: of ACR; "
        "scale_crop: of DeepLab"
    )
    crop_size: Count = key(448, "paper")
    resize_range: tuple[Positive, Positive] = key((0.32, 1.0), "code; long_side_crop: long side in crops")
    workers: Index | None = key(None, "ours: of each process; null: its share of the cores, 1 to train on a CPU")
    on_error: Literal["raise", "skip"] = key(
        "raise", "ours: of a training image or mask that cannot be read; skip: the next image takes its place"
    )
    max_errors: Index = key(10, "ours: with skip, a run with more images that cannot be read ends")
    shapes: Shapes = Shapes()

    @model_validator(mode="after")
    def _fits(self) -> "Data":
        try:
            fits = self.classes is None or class_list(self.classes, "") == self.classes
        except UserError:
            fits = False
        if not fits:
            self.refuse("classes", "one or more names that differ, without background")
        if self.resize_range[0] > self.resize_range[1]:
            self.refuse("resize_range", "[smallest, largest]")
        return self
