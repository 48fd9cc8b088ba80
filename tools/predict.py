"""Predicts images of any size with a checkpoint: label maps, overlays, heat maps and class scores; no masks needed.

    python tools/predict.py CHECKPOINT photos/ more/*.jpg --output predicted --kinds seg lam --crf
    find . -name '*.jpg' | python tools/predict.py CHECKPOINT - --output predicted evaluate.flip=false

INPUT is an image, a folder (with all below it), a pattern in quotes ('a/**/*.png'), or - for a list on stdin. key=value
changes the config of the checkpoint. A second run goes on where the first one stopped. Into OUTPUT go json/,
labels/KIND/, overlays/KIND/ and heat/KIND/CLASS/, which docs/prediction.md describes.

Exit code: 1 where an image could not be read, 2 for a mistake in the arguments.
"""

import argparse
import glob
import sys
from pathlib import Path

from engine.launch import run_script
from datasets import find_images
from datasets.texts import decoded, lines_of
from engine.distributed import cleanup, gather, setup
from engine.inference.image_files import MOST_PIXELS, predict_files
from engine.inference.plan import best_kind
from engine.inference.prediction_folder import Predictor
from utils.cli import CheckpointParser, count
from utils.errors import UserError


def main(argv: list[str]) -> None:
    options = parse(argv)
    ranks = setup(options.device)
    inputs = gather(_inputs(options.inputs) if ranks.rank == 0 else None)[0]   # stdin is read once
    found = find_images(inputs, options.output)
    settings = [f"evaluate.image_labels={'given' if options.labels else 'predicted'}", *options.settings]
    predictor = Predictor(ranks, options.checkpoint, settings, options.config, options.kinds, best_kind)
    done = predict_files(predictor, found, options.output, options.labels, options.most_pixels, options.overwrite)
    if ranks.rank == 0:
        counts = f"{done.written} written, {done.skipped} there already, {done.failed} not readable"
        print(f"{options.output}: {counts}; {done.seconds:.1f} s, {done.written / done.seconds:.2f} images/s")
    cleanup()
    if done.failed:
        sys.exit(1)


def parse(argv: list[str]) -> argparse.Namespace:
    shared = "crf", "multi-scale", "device", "batch", "overwrite"
    parser = CheckpointParser(__doc__, "INPUT [INPUT ...] --output FOLDER ", *shared)
    parser.add_argument("inputs", nargs="+", metavar="INPUT", help="image, folder, pattern, or - for a list on stdin")
    parser.add_argument("--output", type=Path, required=True, help="folder of everything that is written")
    parser.add_argument("--kinds", nargs="+", metavar="KIND", help="default: the method's best kind of map")
    parser.add_argument("--labels", help="the classes in the images, as cat,dog; default: they are predicted")
    parser.add_argument("--most-pixels", type=count, default=MOST_PIXELS,
                        help=f"larger images are reduced to this many, their ids enlarged; default: {MOST_PIXELS}")
    return parser.read(argv)


def _inputs(texts: list[str]) -> list[str]:
    """What the arguments name, with the lines on stdin for -. Raises UserError for what is not there."""
    for text in texts:
        if text != "-" and not glob.has_magic(text) and not Path(text).exists():
            raise UserError(f"{text}: no such image or folder")
    lines = lines_of(decoded(sys.stdin.buffer.read(), "the list on stdin")) if "-" in texts else []
    if "-" in texts and not lines:
        raise UserError("-: no image is named on stdin")
    return [line for text in texts for line in (lines if text == "-" else [text])]


if __name__ == "__main__":
    run_script(main)
