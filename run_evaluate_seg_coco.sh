#!/usr/bin/env bash
# Scores the segmentation of a COCO checkpoint:
#     bash run_evaluate_seg_coco.sh tools/infer_seg_coco.py 0,1 2 val runs/train_coco/checkpoints/best.weights.safetensors
set -euo pipefail
root=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
if [ $# -lt 5 ]; then
    cat >&2 <<'USAGE'
usage: bash run_evaluate_seg_coco.sh SCRIPT DEVICES COUNT SPLIT CHECKPOINT [config=NAME] [key=value ...]
  SCRIPT      tools/infer_seg_coco.py
  DEVICES     cpu, or GPU ids such as 0,1
  COUNT       number of processes, with GPUs the number of ids; the scores do not depend on it
  SPLIT       name of a split list such as val or val_part
  CHECKPOINT  a weights file, a released folder, a name on the Hub, or an official .pth
USAGE
    exit 2
fi
source "$root/utils/python.sh"
settings=("data.val_split=$4" "${@:6}")
exec "$python" "$root/engine/launch.py" "$1" "$2" "$3" auto "$5" "${settings[@]/#config=/--config=}"
