"""Scores every map of a checkpoint on a split with masks.

    python tools/infer_voc.py CHECKPOINT [--config NAME] [--crf] [--multi-scale] [key=value ...]
    bash run_evaluate_voc.sh 0,1 2 CHECKPOINT [config=NAME] [key=value ...]        # on several processes

The config is the one named, else that in the weights file, else the config.yaml of the checkpoint's run, else more_voc;
key=value goes on top. The rows are appended to results.json in the folder of the run.
"""

from collections.abc import Callable, Sequence

from engine.launch import run_script
from engine.config import RunConfig
from engine.distributed import cleanup, setup
from engine.evaluation.checkpoint import evaluate_checkpoint
from utils.cli import CheckpointParser


def main(
    argv: list[str], text: str | None = __doc__, fallback: str = "more_voc", settings: Sequence[str] = (),
    kind: Callable[[RunConfig], str] | None = None,
) -> None:
    """text: for --help. fallback, kind: of `evaluate_checkpoint`. settings: key=value pairs that argv may override."""
    options = CheckpointParser(text, "", "crf", "multi-scale", "device", "batch").read(argv)
    given = [*settings, *options.settings]
    evaluate_checkpoint(setup(options.device), options.checkpoint, given, options.config, fallback, kind)
    cleanup()


if __name__ == "__main__":
    run_script(main)
