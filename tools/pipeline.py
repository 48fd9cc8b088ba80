"""From image-level labels to a network of a second stage, and one report of both; run_pipeline.sh calls it.

    bash run_pipeline.sh DEVICES COUNT TAG [first=more_voc] [second=deeplab_voc] [key=value ...]

Steps, each skipped where it is done: train_first, evaluate_first, sweep (the threshold, on the images that are trained
on), export (pseudo masks), train_second, evaluate_second, report. Every command is printed; ended at any place, the
same call goes on. All is in OUTPUT/TAG (output=runs).

    first=, second=             configs of the two stages
    map=KIND                    of the pseudo masks; default: the last of evaluate.maps that image labels restrict
    crf=false                   pseudo masks without the dense CRF
    sweep=false, images=N       no sweep: the method's own thresholds; a sweep of the first N images
    only=STEP                   that step alone
    first.KEY=, second.KEY=     a key of one stage; KEY=VALUE is for both
"""

from engine.launch import run_script
from engine.pipeline import Pipeline
from utils.cli import Parser


def main(argv: list[str]) -> None:
    parser = Parser(__doc__, usage="%(prog)s DEVICES COUNT TAG [key=value ...]")
    parser.add_argument("devices", metavar="DEVICES", help="cpu, or GPU ids such as 0,1")
    parser.add_argument("count", metavar="COUNT", help="number of processes, with GPUs the number of ids")
    parser.add_argument("tag", metavar="TAG", help="name of the folder")
    parser.add_argument("settings", metavar="KEY=VALUE", nargs="*")
    raise SystemExit(Pipeline(**vars(parser.parse_args(argv))).run())


if __name__ == "__main__":
    run_script(main)
