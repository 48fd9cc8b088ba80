"""Scores a folder of label maps, of any project, against the masks of a data set: the table of an evaluation.

    python tools/score.py MASKS --root VOC2012 --split val
    python tools/score.py CAMS --root VOC2012 --split train --bkg 0.15
    python tools/score.py MASKS --root COCO2014 data.name=coco

MASKS holds NAME.png for every image of the split that has a mask, palette or grey ids, or NAME.npy as irn's make_cam
writes them, whose largest map counts where it is above --bkg. Pixels that a file leaves unsure (255) are left out, as
for exported pseudo masks, and their share is printed. Files of other images are left aside.
"""

import argparse
from pathlib import Path

from engine.launch import run_script
from engine.config import load_config
from engine.evaluation.pseudo_masks import folder_table
from utils.cli import Parser


def main(argv: list[str]) -> None:
    options = parse(argv)
    root = [f"data.root={options.root}"] if options.root else []
    config = load_config(None, [*root, *options.settings, "evaluate.image_labels=predicted"])
    print(folder_table(options.masks, config, options.split or config.data.val_split or "val", options.bkg))


def parse(argv: list[str]) -> argparse.Namespace:
    parser = Parser(__doc__, usage="%(prog)s MASKS [options] [key=value ...]")
    parser.add_argument("masks", type=Path, metavar="MASKS", help="folder of the label PNGs or .npy maps")
    parser.add_argument("--root", metavar="DATA", help="data.root; default: VOC_ROOT or COCO_ROOT")
    parser.add_argument("--split", metavar="NAME", help="default: data.val_split")
    parser.add_argument("--bkg", type=float, help="of .npy maps: background is at or below it; default: evaluate.bkg")
    return parser.read(argv)


if __name__ == "__main__":
    run_script(main)
