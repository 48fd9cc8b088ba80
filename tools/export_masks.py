"""Writes the pseudo masks of a whole split for a second stage: PNGs with 255 where unsure, or irn's dictionaries.

    python tools/export_masks.py CHECKPOINT --output FOLDER [--format png] [--high 0.7 --low 0.25] [key=value ...]
    python tools/export_masks.py CHECKPOINT --output FOLDER --alphas 1 12 [key=value ...]
    python engine/launch.py tools/export_masks.py 0,1 2 auto CHECKPOINT --output FOLDER --format npy data.root=VOC

    --format png        NAME.png, palette: a class where its map is above --high, 0 where all are below --low, else 255;
                        --crf: either threshold's labels go through the dense CRF first.
                        --alphas LOW HIGH: in place of thresholds the dense CRF from the background (1 - map) ** alpha:
                        a class where LOW's says it, 0 where HIGH's says background, else 255; one alpha: no 255.
                        Of a map with a background of its own: the ids of its argmax, nothing is 255
    --format irn-label  the same as irn's cam_to_ir_label makes them: high 0.3, low 0.05, its dense CRF
    --format npy        NAME.npy, as irn's make_cam writes them: keys, cam, high_res

Only the classes of the image labels count; no mask is needed. Where there are masks, the mIoU of the files is printed.
A second run goes on where the first one stopped.
"""

import argparse
from pathlib import Path

from engine.launch import run_script
from engine.distributed import cleanup, setup
from engine.evaluation.pseudo_masks import mask_summary
from engine.inference.plan import seed_kind
from engine.inference.prediction_folder import Predictor
from engine.inference.pseudo_masks import FORMATS, PNG, export_masks
from utils.cli import CheckpointParser


def main(argv: list[str]) -> None:
    options = parse(argv)
    ranks, kinds = setup(options.device), [options.map] if options.map else None
    predictor = Predictor(ranks, options.checkpoint, options.settings, options.config, kinds, seed_kind)
    how = options.format, options.high, options.low, options.overwrite, options.alphas
    exported = export_masks(predictor, options.output, options.split, *how)
    summary = mask_summary(exported)
    if ranks.rank == 0:
        done = exported.written
        print(f"{options.output}: {len(exported.dataset)} files; {done.written} written, {done.seconds:.1f} s")
        print(summary or "no masks there: mIoU not measured")
    cleanup()


def parse(argv: list[str]) -> argparse.Namespace:
    shared = "crf", "multi-scale", "device", "batch", "overwrite"
    parser = CheckpointParser(__doc__, "--output FOLDER ", *shared)
    parser.add_argument("--output", type=Path, required=True, help="folder of the files")
    parser.add_argument("--format", choices=FORMATS, default=PNG, help=f"default: {PNG}")
    parser.add_argument("--map", metavar="KIND", help="default: the last of evaluate.maps that image labels restrict")
    parser.add_argument("--split", metavar="NAME", help="default: data.train_split")
    parser.add_argument("--high", type=float, help="a class counts above it; default: the method's")
    parser.add_argument("--low", type=float, help="background is below it; default: the method's")
    parser.add_argument("--alphas", type=float, nargs="+", metavar=("LOW", "HIGH"), help="in place of --high, --low")
    return parser.read(argv)


if __name__ == "__main__":
    run_script(main)
