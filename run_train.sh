#!/usr/bin/env bash
# Trains on one machine:
#     bash run_train.sh scripts/train_voc.py 0,1 2 29500 train_voc train.batch_size=8
set -euo pipefail
root=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
if [ $# -lt 5 ]; then
    cat >&2 <<'USAGE'
usage: bash run_train.sh SCRIPT DEVICES COUNT PORT TAG [config=NAME] [key=value ...]
  SCRIPT   scripts/train_voc.py, train_coco.py, or train_seg.py for a second stage
  DEVICES  cpu, or GPU ids such as 0,1
  COUNT    number of processes, with GPUs the number of ids
  PORT     a free port such as 29500, or auto
  TAG      name of the run and of its folder
USAGE
    exit 2
fi
source "$root/utils/python.sh"
exec "$python" "$root/engine/launch.py" "$1" "$2" "$3" "$4" "tag=$5" "${@:6}"
