#!/usr/bin/env bash
# Scores CAM, LAM and segmentation of a checkpoint:
#     bash run_evaluate_voc.sh 0 1 runs/train_voc/checkpoints/best.weights.safetensors evaluate.crf=true
set -euo pipefail
root=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
if [ $# -lt 3 ]; then
    cat >&2 <<'USAGE'
usage: bash run_evaluate_voc.sh DEVICES COUNT CHECKPOINT [config=NAME] [key=value ...]
  DEVICES     cpu, or GPU ids such as 0,1
  COUNT       number of processes, with GPUs the number of ids; the scores do not depend on it
  CHECKPOINT  a weights file, a released folder, a name on the Hub, or an official .pth
USAGE
    exit 2
fi
source "$root/utils/python.sh"
set -- "$1" "$2" auto "${@:3}"
exec "$python" "$root/engine/launch.py" "$root/tools/infer_voc.py" "${@/#config=/--config=}"
