"""Trains on data in the VOC layout: train_voc.py tag=TAG [config=more_voc] [key=value ...], under torchrun."""

from engine.launch import run_script
from engine.config import load_config, split_config
from engine.distributed import cleanup, setup
from engine.training.train import train
from engine.watchdog import watching


def main(argv: list[str], default: str = "more_voc") -> None:
    name, overrides = split_config(argv, default)
    config = load_config(name, overrides)
    with watching(config.train.timeout):
        train(config, setup())
        cleanup()


if __name__ == "__main__":
    run_script(main)
