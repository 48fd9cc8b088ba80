"""Scores the best kind of map of a COCO checkpoint; of MoRe that is the segmentation.

    python tools/infer_seg_coco.py CHECKPOINT [--config NAME] data.val_split=SPLIT [key=value ...]
    bash run_evaluate_seg_coco.sh tools/infer_seg_coco.py 0,1 2 SPLIT CHECKPOINT [config=NAME] [key=value ...]

Images keep their native size, times each scale; the config is found as infer_voc.py finds it, else more_coco.
"""

from engine.launch import run_script
from engine.inference.plan import best_kind
from tools import infer_voc


def main(argv: list[str]) -> None:
    infer_voc.main(argv, __doc__, "more_coco", ["evaluate.base_size=null"], best_kind)


if __name__ == "__main__":
    run_script(main)
