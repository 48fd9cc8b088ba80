"""Makes an MS COCO 2014 folder to train on from the official annotations: masks, lists, labels, images.

    python tools/prepare_coco.py OUT --annotations COCO/annotations --image-folder COCO
    python tools/prepare_coco.py OUT --annotations COCO/annotations --image-folder COCO --images copy
    python tools/prepare_coco.py OUT --verify

    --annotations    the folder of instances_train2014.json and instances_val2014.json
    --image-folder   the folder of train2014/ and val2014/

What is made of them, and why: docs/data.md.
"""

import argparse
from pathlib import Path

from engine.launch import run_script
from datasets.prepare import preparation
from datasets.prepare.coco import prepare


def main(argv: list[str]) -> None:
    prepare(_options(argv))


def _options(argv: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0], epilog="See docs/data.md.")
    preparation.add_arguments(parser)
    parser.add_argument("--annotations", type=Path, metavar="FOLDER", help="of instances_{train,val}2014.json")
    parser.add_argument("--image-folder", type=Path, metavar="FOLDER", help="of train2014/ and val2014/")
    parser.add_argument("--images", choices=("link", "copy", "leave"), default="link",
                        help="link (default): symbolic links; leave: OUT/JPEGImages is there, or comes later")
    return parser.parse_args(argv)


if __name__ == "__main__":
    run_script(main)
