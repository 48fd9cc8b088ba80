#!/usr/bin/env bash
# From nothing to scores and pictures on generated images; key=value arguments go to the training:
#     bash run_demo.sh train.iterations=200
set -euo pipefail
root=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
run=$root/runs/demo
SECONDS=0
bash "$root/utils/install.sh" requirements.txt
cd "$root"
devices=$(.venv/bin/python -c "import torch; print('0' if torch.cuda.is_available() else 'cpu')")
installed=$SECONDS

echo "training MoRe on generated shapes (config more_shapes), from weights/vit_shapes.safetensors: a small ViT that"
echo "learned the image-level labels of other generated shapes (weights/README.md); no mask is read in training"
bash run_train.sh scripts/train_voc.py "$devices" 1 auto demo config=more_shapes output="$root/runs" resume=auto "$@"
trained=$SECONDS
weights=$(ls "$run"/checkpoints/iter_*.weights.safetensors | tail -n 1)
bash run_evaluate_voc.sh "$devices" 1 "$weights" evaluate.save_overlays="$run/pictures"
evaluated=$SECONDS
.venv/bin/python tools/make_report.py "$run"

cat <<END

seconds     installation $installed, training $((trained - installed)), evaluation $((evaluated - trained)), report $((SECONDS - evaluated))
data        $root/data/shapes
run         $run  (config.yaml, train.log, metrics.jsonl)
weights     $weights
scores      $run/results.json
pictures    $run/pictures  (input, mask, CAM, LAM, segmentation side by side)
curves      .venv/bin/python -m tensorboard.main --logdir $run/tensorboard
report      $run/report.html  (all of it on one page: open it in a browser)
END
