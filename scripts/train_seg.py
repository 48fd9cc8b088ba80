"""Trains the second stage on masks: train_seg.py tag=TAG data.masks=FOLDER [config=deeplab_voc] [key=value ...], under
torchrun."""

from engine.launch import run_script
from scripts.train_voc import main

if __name__ == "__main__":
    run_script(lambda argv: main(argv, default="deeplab_voc"))
