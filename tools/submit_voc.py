"""Makes the archive that the PASCAL VOC 2012 test server takes, checked before and after it is written.

    python tools/submit_voc.py CHECKPOINT --root VOC2012 --output more.tgz --map lam --multi-scale --crf
    python tools/submit_voc.py --masks FOLDER --root VOC2012 --output more.tgz

The first predicts the images of ImageSets/Segmentation/test.txt, with predicted image labels, into the folder --masks
(default: OUTPUT without .tgz, _masks behind it), and packs that; called again it goes on where it stopped. The second
packs NAME.png of a folder. The archive holds results/VOC2012/Segmentation/comp6_test_cls/NAME.png.

comp6 is for methods trained with any data but the test set's, ImageNet weights among it; comp5 for VOC's own alone.
"""

import argparse
from pathlib import Path

from engine.launch import run_script
from engine.distributed import cleanup, setup
from engine.inference import submission
from engine.inference.plan import best_kind
from engine.inference.prediction_folder import Predictor
from utils.cli import CheckpointParser
from utils.errors import UserError


def main(argv: list[str]) -> None:
    options = parse(argv)
    dataset, masks = submission.images_to_submit(options.root, options.split), options.masks
    ranks, kinds, said = setup(options.device), [options.map] if options.map else None, []
    if options.checkpoint:
        masks = masks or options.output.with_name(options.output.name.partition(".")[0] + "_masks")
        settings = [*submission.data_settings(options.root), *options.settings]
        predictor = Predictor(ranks, options.checkpoint, settings, options.config, kinds, best_kind)
        said.append(submission.predict_masks(predictor, masks, options.split, options.overwrite))
    if ranks.rank == 0:
        submission.write_archive(options.output, masks, dataset.samples, options.competition)
        said.append(f"{options.output}: {len(dataset)} images, {options.competition}, checked")
        full = submission.TEST_IMAGES
        if len(dataset) != full:
            said.append(f"note: the VOC 2012 test set has {full} images, the split {options.split} has {len(dataset)}")
        print("\n".join(said))
    cleanup()


def parse(argv: list[str]) -> argparse.Namespace:
    shared = "crf", "multi-scale", "device", "batch", "overwrite"
    parser = CheckpointParser(__doc__, "--root VOC --output FILE.tgz ", *shared, nargs="?")
    parser.add_argument("--masks", type=Path, metavar="FOLDER", help="of the label PNGs; they need no CHECKPOINT")
    parser.add_argument("--root", required=True, metavar="VOC", help="the VOC folder, with the test images")
    parser.add_argument("--output", type=Path, required=True, help="the archive, a .tgz")
    parser.add_argument("--split", default="test", metavar="NAME", help="default: test")
    parser.add_argument("--competition", choices=submission.COMPETITIONS, default="comp6", help="default: comp6")
    parser.add_argument("--map", metavar="KIND", help="which map is submitted; default: the method's best kind")
    options = parser.read(argv)
    if options.output.suffix not in (".tgz", ".gz"):
        raise UserError(f"--output {options.output}: the server takes a .tgz")
    if not options.checkpoint and not options.masks:
        raise UserError("give CHECKPOINT, or --masks FOLDER with the label PNGs")
    return options


if __name__ == "__main__":
    run_script(main)
