"""Finds the background threshold of maps: their mIoU at 0, 0.01, ... 0.99, in one pass over a split with masks.

    python tools/sweep.py CHECKPOINT [--map KIND ...] [--split NAME] [--write] [key=value ...]
    python engine/launch.py tools/sweep.py 0,1 2 auto CHECKPOINT --split train data.root=VOC2012

Prints the curve of every kind that a threshold decides and names the best, by the mIoU over the classes present in the
ground truth; beside it stands ACR's, over all classes. The best was chosen on the masks it is scored on, and its line
says so. --write appends it to results.json of the run, and puts sweep.json and sweep.svg into its evaluation/.
"""

from engine.launch import run_script
from engine.distributed import cleanup, setup
from engine.evaluation.sweep import THRESHOLDS, curve_text, sweep_checkpoint
from engine.inference.plan import title_of
from report.charts import threshold_chart
from utils.cli import CheckpointParser
from utils.files import replacing


def main(argv: list[str]) -> None:
    parser = CheckpointParser(__doc__, "[--map KIND ...] [--split NAME] [--write] ", "multi-scale", "device", "batch")
    parser.add_argument("--map", nargs="+", metavar="KIND", help="default: those of evaluate.maps with a threshold")
    parser.add_argument("--split", metavar="NAME", help="a split with masks; default: data.val_split")
    parser.add_argument("--write", action="store_true", help="keep the best and the curve in the run's folder")
    options = parser.read(argv)
    settings, ranks = options.settings, setup(options.device)
    settings += [f"data.val_split={options.split}"] if options.split else []
    how = options.config, options.map, options.write
    curves, folder = sweep_checkpoint(ranks, options.checkpoint, settings, *how)
    if ranks.rank == 0:
        print("\n" + "\n\n".join(map(curve_text, curves.values())))
    if folder and ranks.rank == 0:
        found = {title_of(curve.row["method"], kind): curve.miou for kind, curve in curves.items()}
        with replacing(folder / "sweep.svg") as part:
            part.write_text(threshold_chart(THRESHOLDS, found), encoding="utf-8")
        print(f"results: {folder.parents[1] / 'results.json'}, {folder}")
    cleanup()


if __name__ == "__main__":
    run_script(main)
