"""Reads every image, mask and label of a data set once and lists all that is wrong; a training stops at the first.

    python tools/check_dataset.py data.root=VOC2012
    python tools/check_dataset.py --config more_coco --splits train val --json faults.json data.root=COCO2014

Takes the config of the training. Looks for missing and broken images and masks, masks of another size, with unknown ids
or other classes than the labels, images without labels, labels without an image, images of one split in the other and
pictures that are there twice, by their pixels. Exit code: 0 nothing is wrong, 1 there are faults, 2 no such data.
"""

import argparse
import json
import os
import sys
from pathlib import Path

from engine.launch import run_script
from datasets.check import check
from engine.config import load_config
from utils.cli import Parser, count
from utils.files import replacing


def main(argv: list[str]) -> None:
    options = parse(argv)
    config = load_config(options.config, options.settings)
    splits = options.splits or [split for split in (config.data.train_split, config.data.val_split) if split]
    report = check(config, splits, options.workers)
    print(report.text(options.show))
    if options.json:
        with replacing(options.json) as part:
            part.write_text(json.dumps(report.as_json(), indent=1), encoding="utf-8")
    if not report.clean:
        sys.exit(1)


def parse(argv: list[str]) -> argparse.Namespace:
    parser = Parser(__doc__, usage="%(prog)s [options] [key=value ...]")
    parser.add_argument("--config", metavar="NAME", help="a config's name or file; default: the defaults")
    parser.add_argument("--splits", nargs="+", metavar="NAME", help="default: data.train_split and data.val_split")
    parser.add_argument("--workers", type=count, default=len(os.sched_getaffinity(0)), help="processes; default: cores")
    parser.add_argument("--show", type=count, default=5, metavar="N", help="faults of a kind to print; default: 5")
    parser.add_argument("--json", type=Path, metavar="FILE", help="writes all of them there")
    return parser.read(argv)


if __name__ == "__main__":
    run_script(main)
