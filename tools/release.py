"""Puts a run into one folder to share: weights, config, results, metrics, log, model card, hashes, registry row.

    python tools/release.py runs/train_voc releases/more_voc
    python tools/release.py runs/train_voc releases/more_voc --weights iter_020000.weights.safetensors \\
        --url https://host/more_voc --licence MIT

OUT/NAME.safetensors holds the weights and, in its header, the class names and the config: the file opens by itself.
No file names a folder of this machine. A second call gives the same files; OUT appears at the end, as a whole.
"""

import argparse
from pathlib import Path

from engine.launch import run_script
from engine.checkpoints.release import ROW, release
from utils.cli import Parser


def main(argv: list[str]) -> None:
    options = parse(argv)
    changed = release(**vars(options))
    print(f"{options.out}: {'released' if changed else 'released already, nothing to do'}")
    print(f"{options.out / ROW} is the row for weights/registry.yaml" + ("" if options.url else "; it has no url yet"))


def parse(argv: list[str]) -> argparse.Namespace:
    parser = Parser(__doc__)
    parser.add_argument("run", type=Path, metavar="RUN", help="the folder of a run")
    parser.add_argument("out", type=Path, metavar="OUT", help="the folder to write; an earlier release is replaced")
    parser.add_argument("--weights", help="a file of RUN/checkpoints (default: the best; without validation, the last)")
    parser.add_argument("--name", help="of the weights file and the registry's row (default: the name of OUT)")
    parser.add_argument("--unfinished", action="store_true", help="release a run that has not done all its iterations")
    parser.add_argument("--url", help="address the folder will have, for the registry's row")
    parser.add_argument("--page", help="page where a person gets the file, for the registry's row (default: --url)")
    parser.add_argument("--licence", help="licence of the weights, for the registry's row")
    return parser.parse_args(argv)


if __name__ == "__main__":
    run_script(main)
