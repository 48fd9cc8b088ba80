"""Trains on data in the VOC layout: train_voc.py tag=TAG [config=more_voc] [key=value ...], under torchrun."""

from engine.launch import run_script
from engine.config import load_config, split_config
from engine.distributed import cleanup, setup
from engine.training.train import train


def main(argv: list[str], default: str = "more_voc") -> None:
    name, overrides = split_config(argv, default)
    ranks = setup()
    train(load_config(name, overrides), ranks)
    cleanup()


if __name__ == "__main__":
    run_script(main)
