"""Makes a folder to train on from your own images, a table of their classes and, if there are any, masks.

    python tools/prepare_folder.py OUT --images PHOTOS --labels labels.csv
    python tools/prepare_folder.py OUT --images PHOTOS --labels labels.csv --masks MASKS --classes nut,bolt
    python tools/prepare_folder.py OUT --images PHOTOS --labels labels.json --masks MASKS --ids 38=nut,75=bolt,7=ignore
    python tools/prepare_folder.py OUT --verify

    --labels   a CSV: an image in the first column, its classes in the others, or in one, apart by ';'; rows of one
               image add up, 'background' is no class, a first row that starts with 'image' is a heading. Or a table of
               0 and 1 below the names of the classes.
               Or a JSON: {"image": ["class", ...], ...}
    --images   searched with all its subfolders; an image is its path in there, its file name, or that without ending
    --masks    palette or grey PNGs (RGB ones in VOC's colours), likewise; found by the image's name without ending
    --ids      what the masks' ids mean, ID=CLASS,... or a JSON {"ID": "CLASS"}; background is 0 and ignore is 255 in
               what is written. Without it the ids are 0 background, 1, 2, ... in the order of --classes, 255 ignore

What is made of them, and why: docs/data.md.
"""

import argparse
from pathlib import Path

from engine.launch import run_script
from datasets.prepare import preparation
from datasets.prepare.folder import VAL_SHARE, prepare


def main(argv: list[str]) -> None:
    prepare(_options(argv))


def _options(argv: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, epilog="See docs/data.md.", formatter_class=argparse.RawDescriptionHelpFormatter
    )
    preparation.add_arguments(parser)
    parser.add_argument("--images", type=Path, metavar="FOLDER")
    parser.add_argument("--labels", type=Path, metavar="FILE", help=".csv or .json")
    parser.add_argument("--masks", type=Path, metavar="FOLDER")
    parser.add_argument("--classes", metavar="A,B,...", help="in the order of their ids; default: the table's, sorted")
    parser.add_argument("--ids", metavar="ID=CLASS,...|JSON")
    parser.add_argument("--val-share", type=_share, help=f"of the images, those with a mask ({VAL_SHARE})")
    parser.add_argument("--seed", type=int, default=0, help="of the choice of val")
    parser.add_argument("--train-list", type=Path, metavar="FILE", help="images to train on, one on each line")
    parser.add_argument("--val-list", type=Path, metavar="FILE", help="images to validate on, one on each line")
    parser.add_argument("--link", action="store_true", help="symbolic links to the images instead of copies")
    return parser.parse_args(argv)


def _share(text: str) -> float:
    if not 0 <= float(text) < 1:
        raise ValueError(text)
    return float(text)


if __name__ == "__main__":
    run_script(main)
