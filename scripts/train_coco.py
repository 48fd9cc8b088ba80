"""Trains on data in the COCO layout: train_coco.py tag=TAG [config=more_coco] [key=value ...], under torchrun."""

from engine.launch import run_script
from scripts.train_voc import main

if __name__ == "__main__":
    run_script(lambda argv: main(argv, default="more_coco"))
