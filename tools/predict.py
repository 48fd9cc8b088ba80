"""Predicts images of any size with a checkpoint: label maps, overlays, heat maps and class scores; no masks needed.

    python tools/predict.py CHECKPOINT photos/ more/*.jpg --output predicted --kinds seg lam --crf
    find . -name '*.jpg' | python tools/predict.py CHECKPOINT - --output predicted evaluate.flip=false

INPUT is an image, a folder (with all below it), a pattern in quotes ('a/**/*.png'), or - for a list on stdin. key=value
changes the config of the checkpoint. A second run goes on where the first one stopped.

    OUTPUT/json/NAME.json            written last: class scores, present classes, share of the pixels a class
    OUTPUT/labels/KIND/NAME.png      ids in the VOC palette, at the image's size; KIND_crf after the dense CRF
    OUTPUT/overlays/KIND/NAME.jpg    the same over the image
    OUTPUT/heat/KIND/CLASS/NAME.jpg  CAM and LAM of every present class

Exit code: 1 where an image could not be read, 2 for a mistake in the arguments.
"""

import argparse
import glob
import json
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

import cv2
import numpy as np
import torch

from engine.launch import run_script
from datasets import FileItem, ImageFiles, find_images, unique_names
from engine.checkpoints.opening import find_checkpoint, open_checkpoint
from engine.distributed import Ranks, pick_device
from engine.inference.images import claim_folder, is_finished, made_with, write_predictions
from engine.inference.pictures import save_picture
from engine.inference.predict import KINDS, Plan, Prediction, evaluation_plan, row_name
from utils.errors import UserError
from utils.files import replacing
from utils.images import heatmap, overlay, to_uint8, write_label_png

LEAST_SIDE = 32        # pixels at the smallest scale, at native size: a patch, and no less, fits
MOST_PIXELS = 1_000_000


class Writer:
    """Writes what became of an image; called by several threads."""

    def __init__(self, output: Path, classes: Sequence[str], plan: Plan) -> None:
        self.output, self.classes, self.plan = output, classes, plan

    def __call__(self, item: FileItem, prediction: Prediction) -> None:
        image = to_uint8(item.image)
        shares = {}
        for row, ids in prediction.labels.items():
            drawn, full = row_name(row), _enlarged(ids, item.size)
            write_label_png(self.output / "labels" / drawn / f"{item.name}.png", full)
            save_picture(self.output / "overlays" / drawn / f"{item.name}.jpg", overlay(image, ids))
            shares[drawn] = self._shares(full)
        for kind in ("cam", "lam"):
            if kind in self.plan.kinds:
                self._save_heat(kind, item.name, prediction, image)
        self._save_json(item, prediction, shares)

    def _shares(self, ids: np.ndarray) -> dict[str, float]:
        """{class or background: share of the pixels}, of those that have any."""
        counts = np.bincount(ids.ravel(), minlength=len(self.classes) + 1)
        names = ("background", *self.classes)
        return {name: count / ids.size for name, count in zip(names, counts.tolist(), strict=True) if count}

    def _save_heat(self, kind: str, name: str, prediction: Prediction, image: np.ndarray) -> None:
        for index in prediction.present.nonzero().flatten().tolist():
            folder = self.output / "heat" / kind / self.classes[index].replace("/", "_")
            save_picture(folder / f"{name}.jpg", heatmap(prediction.maps[kind][index].cpu().numpy(), image))

    def _save_json(self, item: FileItem, prediction: Prediction, shares: dict) -> None:
        scores = prediction.class_logits.sigmoid().tolist()
        present = [self.classes[index] for index in prediction.present.nonzero().flatten().tolist()]
        entry = {
            "image": str(item.path), "height": item.size[0], "width": item.size[1],
            "computed": list(item.image.shape[1:]),
            "image_labels": f"predicted by the {self.plan.predicted}" if self.plan.predicted else "given",
            "present": present, "scores": dict(zip(self.classes, scores, strict=True)), "shares": shares,
        }
        with replacing(json_path(self.output, item.name)) as part:
            part.write_text(json.dumps(entry, indent=1) + "\n", encoding="utf-8")


def json_path(output: Path, name: str) -> Path:
    return output / "json" / f"{name}.json"


def finished_names(output: Path, paths: dict[str, Path]) -> Callable[[str], bool]:
    """Whether the image of a name is done. Raises UserError where the file is another image's."""
    is_new = is_finished(output)

    def finished(name: str) -> bool:
        path = json_path(output, name)
        if not is_new(path):
            return False
        of = json.loads(path.read_text(encoding="utf-8"))["image"]
        if of != str(paths[name]):
            raise UserError(f"{path}: is of {of}, not of {paths[name]}; give another --output, or --overwrite")
        return True

    return finished


def take_settings(argv: Sequence[str]) -> tuple[list[str], list[str]]:
    """(the key=value pairs, the other arguments); what exists as a file is none."""
    pairs = [item for item in argv if "=" in item and not item.startswith("-") and not Path(item).exists()]
    return pairs, [item for item in argv if item not in pairs]


def given_labels(text: str, classes: Sequence[str]) -> torch.Tensor:
    """'cat,dog' -> multi-hot float32 (K,). Raises UserError for a class that the checkpoint does not have."""
    labels = torch.zeros(len(classes))
    for name in (part.strip() for part in text.split(",")):
        if name not in classes:
            raise UserError(f"--labels: the checkpoint has no class '{name}'; it has {', '.join(classes)}")
        labels[classes.index(name)] = 1
    return labels


def settings_of(options: argparse.Namespace, pairs: Sequence[str]) -> list[str]:
    """The options as key=value pairs of the config, before the user's own."""
    kinds = ",".join(options.kinds)
    labels = "given" if options.labels else "predicted"
    own = [f"evaluate.maps=[{kinds}]", f"evaluate.image_labels={labels}"]
    own += ["evaluate.crf=true"] * options.crf + ["evaluate.multi_scale=true"] * options.multi_scale
    own += [f"evaluate.images_at_once={options.batch}"] if options.batch else []
    return [*own, *pairs]


def least_side(plan: Plan) -> int:
    """The shortest side of an image, in pixels, that goes through the network."""
    if plan.base_size is not None:
        return 1
    return int(LEAST_SIDE / min(min(plan.maps[kind].scales) for kind in plan.kinds))


def main(argv: list[str]) -> None:
    pairs, rest = take_settings(argv)
    options = _parser().parse_intermixed_args(rest)
    for text in options.inputs:
        if text != "-" and not glob.has_magic(text) and not Path(text).exists():
            raise UserError(f"{text}: no such image or folder")
    inputs = [line for text in options.inputs for line in (_stdin_lines() if text == "-" else [text])]
    found = find_images(inputs, options.output)
    device = pick_device(options.device)
    file = find_checkpoint(options.checkpoint)
    opened = open_checkpoint(file, settings_of(options, pairs), options.config)
    plan = evaluation_plan(opened.config)._replace(class_logits=True)
    labels = given_labels(options.labels, opened.classes) if options.labels else None
    if labels is None and plan.predicted is None:
        raise UserError("evaluate.image_labels=given: say which with --labels cat,dog")

    ranks = Ranks(0, 1, device)
    settings = {**made_with(file, plan, opened.config), "labels": options.labels, "most_pixels": options.most_pixels}
    claim_folder(options.output, settings, options.overwrite, ranks)
    names = unique_names(found)
    paths = [image for _, image in found]
    dataset = ImageFiles(paths, names, labels, least_side(plan), options.most_pixels)
    finished = finished_names(options.output, dict(zip(names, paths, strict=True)))
    write = Writer(options.output, opened.classes, plan)
    done = write_predictions(opened.method.to(device), dataset, plan, ranks, opened.config, write, finished, "predict")
    rate = f"{done.seconds:.1f} s, {done.written / done.seconds:.2f} images/s"
    print(f"{options.output}: {done.written} written, {done.skipped} there already, {done.failed} not readable; {rate}")
    if done.failed:
        sys.exit(1)


def _enlarged(ids: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """Ids (h, w) at the size (H, W): each pixel takes the nearest's."""
    return ids if ids.shape == size else cv2.resize(ids, size[::-1], interpolation=cv2.INTER_NEAREST_EXACT)


def _stdin_lines() -> list[str]:
    lines = [line.rstrip("\n") for line in sys.stdin if line.strip()]
    if not lines:
        raise UserError("-: no image is named on stdin")
    return lines


def _positive(text: str) -> int:
    """Raises ValueError, as argparse wants it."""
    if int(text) < 1:
        raise ValueError(text)
    return int(text)


def _parser() -> argparse.ArgumentParser:
    form = argparse.RawDescriptionHelpFormatter
    usage = "predict.py CHECKPOINT INPUT [INPUT ...] --output FOLDER [options] [key=value ...]"
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=form, usage=usage)
    parser.add_argument("checkpoint", metavar="CHECKPOINT", help="weights of a run, a folder as released, a .pth")
    parser.add_argument("inputs", nargs="+", metavar="INPUT", help="image, folder, pattern, or - for a list on stdin")
    parser.add_argument("--output", type=Path, required=True, help="folder of everything that is written")
    parser.add_argument("--kinds", nargs="+", choices=KINDS, default=["seg"], help="maps to make; default: seg")
    parser.add_argument("--crf", action="store_true", help="label maps after the dense CRF as well")
    parser.add_argument("--multi-scale", action="store_true", help="CAM and LAM over evaluate.multi_scales")
    parser.add_argument("--labels", help="the classes in the images, as cat,dog; default: they are predicted")
    parser.add_argument("--config", help="a config's name or file; default: the checkpoint's own")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--batch", type=_positive, help="images of one size computed together; default: 1, on a GPU 8")
    parser.add_argument("--most-pixels", type=_positive, default=MOST_PIXELS,
                        help=f"larger images are reduced to this many, their ids enlarged; default: {MOST_PIXELS}")
    parser.add_argument("--overwrite", action="store_true", help="predict again what is there already")
    return parser


if __name__ == "__main__":
    run_script(main)
