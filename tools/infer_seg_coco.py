"""Scores the segmentation of a COCO checkpoint: infer_seg_coco.py checkpoint=PATH data.val_split=SPLIT [key=value ...].

Started by run_evaluate_seg_coco.sh under torchrun. Images keep their native size, times each scale; the config is found
as infer_voc.py finds it, else more_coco.
"""

from engine.launch import run_script
from tools import infer_voc


def main(argv: list[str]) -> None:
    infer_voc.main(argv, "more_coco", ("evaluate.maps=[seg]", "evaluate.base_size=null"))


if __name__ == "__main__":
    run_script(main)
