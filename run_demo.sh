#!/usr/bin/env bash
# From nothing to scores and pictures on generated images; key=value arguments go to the training:
#     bash run_demo.sh train.iterations=200
set -euo pipefail
root=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
data=$root/data/shapes
run=$root/runs/demo
bash "$root/utils/install.sh" requirements.txt
cd "$root"

devices=$(.venv/bin/python -c "import torch; print('0' if torch.cuda.is_available() else 'cpu')")
.venv/bin/python tools/prepare_shapes.py "$data"
bash run_train.sh scripts/train_voc.py "$devices" 1 auto demo \
    config=more_shapes data.root="$data" output="$root/runs" resume=auto "$@"
bash run_evaluate_voc.sh "$devices" 1 "$run/checkpoints/best.weights.safetensors" \
    config="$run/config.yaml" evaluate.save_overlays="$run/pictures"

cat <<END

data        $data
run         $run  (config.yaml, train.log, metrics.jsonl)
weights     $run/checkpoints/best.weights.safetensors
scores      $run/results.json
pictures    $run/pictures
curves      .venv/bin/python -m tensorboard.main --logdir $run/tensorboard
END
