#!/usr/bin/env bash
# Trains a method on image-level labels, makes pseudo masks of its maps and trains a second stage on them:
#     bash run_pipeline.sh 0,1 2 voc first=more_voc second=deeplab_voc data.root=VOC2012
set -euo pipefail
root=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
if [ $# -lt 3 ]; then
    cat >&2 <<'USAGE'
usage: bash run_pipeline.sh DEVICES COUNT TAG [first=CONFIG] [second=CONFIG] [key=value ...]
  DEVICES  cpu, or GPU ids such as 0,1
  COUNT    number of processes, with GPUs the number of ids
  TAG      name of the folder, runs/TAG
  the keys: python tools/pipeline.py --help
USAGE
    exit 2
fi
source "$root/utils/python.sh"
exec "$python" "$root/tools/pipeline.py" "$@"
