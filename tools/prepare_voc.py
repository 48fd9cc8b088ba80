"""Makes a PASCAL VOC 2012 folder to train on from the official downloads: images, masks, lists, labels.

    python tools/prepare_voc.py OUT --voc VOCtrainval_11-May-2012.tar VOC2012test.tar --sbd SegmentationClassAug.zip
    python tools/prepare_voc.py OUT --voc VOCdevkit --sbd benchmark.tgz
    python tools/prepare_voc.py OUT --verify

    --voc   the devkit's archives, or its unpacked folder (VOCdevkit, VOC2012)
    --sbd   masks of the Semantic Boundaries Dataset (Hariharan et al., ICCV 2011): its benchmark.tgz or unpacked folder
            (dataset/cls/*.mat), or the SegmentationClassAug folder or zip that segmentation projects pass on

What is made of them, and why: docs/data.md.
"""

import argparse
from pathlib import Path

from engine.launch import run_script
from datasets.prepare import preparation
from datasets.prepare.voc import prepare


def main(argv: list[str]) -> None:
    prepare(_options(argv))


def _options(argv: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0], epilog="See docs/data.md.")
    preparation.add_arguments(parser)
    parser.add_argument("--voc", nargs="+", type=Path, metavar="FILE", help="VOC 2012 archives, or the unpacked folder")
    parser.add_argument("--sbd", type=Path, metavar="FILE", help="benchmark.tgz, SegmentationClassAug.zip or folder")
    parser.add_argument("--train-aug", type=Path, metavar="LIST", help="take this list of train_aug, not the computed")
    parser.add_argument("--images", choices=("link", "copy"), default="copy",
                        help="link: symbolic links into an unpacked folder (archives: copied all the same)")
    parser.add_argument("--partial", action="store_true", help="accept other counts of images than the official ones")
    parser.add_argument("--compare-labels", type=Path, metavar="NPY", help="a released cls_labels_onehot.npy")
    return parser.parse_args(argv)


if __name__ == "__main__":
    run_script(main)
