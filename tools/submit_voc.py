"""Makes the archive that the PASCAL VOC 2012 test server takes, checked before and after it is written.

    python tools/submit_voc.py --checkpoint PATH --root VOC2012 --output more.tgz --map lam --multi-scale --crf
    python tools/submit_voc.py --masks FOLDER --root VOC2012 --output more.tgz

The first predicts the images of ImageSets/Segmentation/test.txt, with predicted image labels, into the folder --masks
(default: OUTPUT without .tgz, _masks behind it), and packs that; called again it goes on where it stopped. The second
packs NAME.png of a folder. The archive holds results/VOC2012/Segmentation/comp6_test_cls/NAME.png.

comp6 is for methods trained with any data but the test set's, ImageNet weights among it; comp5 for VOC's own alone.
"""

import argparse
from pathlib import Path

import torch

from engine.launch import run_script
from datasets import EvalItem, build_image_set
from datasets.voc import CLASSES
from engine.checkpoints.opening import find_checkpoint, open_checkpoint
from engine.distributed import Ranks, pick_device
from engine.evaluation.evaluate import check_classes
from engine.inference.images import claim_folder, is_finished, made_with, write_predictions
from engine.inference.predict import KINDS, Prediction, evaluation_plan, row_name
from engine.inference.submission import COMPETITIONS, TEST_IMAGES, write_archive
from engine.config import load_config
from utils.errors import UserError
from utils.images import write_label_png


def predict_masks(options: argparse.Namespace, data: list[str], masks: Path) -> None:
    """Fills the folder `masks` with the label PNGs of a checkpoint."""
    file = find_checkpoint(options.checkpoint)
    own = [*data, f"evaluate.maps=[{options.map}]"]
    own += ["evaluate.crf=true"] * options.crf + ["evaluate.multi_scale=true"] * options.multi_scale
    own += [f"evaluate.images_at_once={options.batch}"] if options.batch else []
    opened = open_checkpoint(file, [*own, *options.settings], options.config)
    plan, ranks = evaluation_plan(opened.config), Ranks(0, 1, pick_device(options.device))
    dataset, row = build_image_set(opened.config, options.split), plan.rows[-1]
    check_classes(file, CLASSES)
    settings = {**made_with(file, plan, opened.config), "images": dataset.identity()}
    claim_folder(masks, settings, options.overwrite, ranks)
    is_done = is_finished(masks)

    def write(item: EvalItem, prediction: Prediction) -> None:
        write_label_png(masks / f"{item.name}.png", prediction.labels[row])

    done = write_predictions(
        opened.method.to(ranks.device), dataset, plan, ranks, opened.config, write,
        lambda name: is_done(masks / f"{name}.png"), "predict",
    )
    print(f"{masks}: {row_name(row)} of {len(dataset)} images, {done.written} now, {done.seconds:.1f} s", flush=True)


def main(argv: list[str]) -> None:
    options = _parser().parse_intermixed_args(argv)
    data = ["data.name=voc", f"data.root={options.root}", "evaluate.image_labels=predicted"]
    if options.output.suffix not in (".tgz", ".gz"):
        raise UserError(f"--output {options.output}: the server takes a .tgz")
    if not options.checkpoint and not options.masks:
        raise UserError("give --checkpoint PATH, or --masks FOLDER with the label PNGs")
    masks = options.masks or options.output.with_name(options.output.name.partition(".")[0] + "_masks")
    dataset = build_image_set(load_config(None, data), options.split)
    if options.checkpoint:
        predict_masks(options, data, masks)
    write_archive(options.output, masks, dataset.samples, options.competition)
    print(f"{options.output}: {len(dataset)} images, {options.competition}, checked")
    if len(dataset) != TEST_IMAGES:
        print(f"note: the VOC 2012 test set has {TEST_IMAGES} images, the split {options.split} has {len(dataset)}")


def _parser() -> argparse.ArgumentParser:
    form = argparse.RawDescriptionHelpFormatter
    usage = "submit_voc.py (--checkpoint PATH | --masks FOLDER) --root VOC --output FILE.tgz [options] [key=value ...]"
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=form, usage=usage)
    parser.add_argument("--checkpoint", help="weights of a run, a folder as released, a .pth")
    parser.add_argument("--masks", type=Path, help="folder of the label PNGs")
    parser.add_argument("--root", required=True, help="the VOC folder, with the test images")
    parser.add_argument("--output", type=Path, required=True, help="the archive, a .tgz")
    parser.add_argument("--split", default="test", help="default: test")
    parser.add_argument("--competition", choices=COMPETITIONS, default="comp6", help="default: comp6")
    parser.add_argument("--map", choices=KINDS, default="seg", help="which map is submitted; default: seg")
    parser.add_argument("--crf", action="store_true", help="after the dense CRF")
    parser.add_argument("--multi-scale", action="store_true", help="CAM and LAM over evaluate.multi_scales")
    parser.add_argument("--config", help="a config's name or file; default: the checkpoint's own")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--batch", type=int, help="images of one size computed together; default: 1, on a GPU 8")
    parser.add_argument("--overwrite", action="store_true", help="predict again what is there already")
    parser.add_argument("settings", nargs="*", metavar="key=value", help="change the config of the checkpoint")
    return parser


if __name__ == "__main__":
    run_script(main)
