#!/usr/bin/env bash
# From nothing to scores and pictures on generated images; key=value arguments go to the training:
#     bash run_demo.sh train.iterations=200
#     bash run_demo.sh method=afa
set -euo pipefail
root=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
method=more tag=demo settings=()
for argument in "$@"; do
  case $argument in
    method=*) method=${argument#method=} ;;
    *) settings+=("$argument") ;;
  esac
done
[ "$method" = more ] || tag=demo_$method
if [ ! -f "$root/configs/${method}_shapes.yaml" ]; then
  known=$(cd "$root/configs" && printf '%s\n' *_shapes.yaml | sed 's/_shapes.yaml//' | paste -sd ' ')
  echo "method=$method: there is no configs/${method}_shapes.yaml; methods with a demo: $known" >&2
  exit 2
fi
run=$root/runs/$tag
SECONDS=0
bash "$root/utils/install.sh" requirements.txt
cd "$root"
devices=$(.venv/bin/python -c "import torch; print('0' if torch.cuda.is_available() else 'cpu')")
installed=$SECONDS

weights=$(.venv/bin/python tools/config.py "${method}_shapes" | sed -n 's/^model\.weights: \([^ ]*\).*/\1/p')
echo "training on generated shapes (config ${method}_shapes), from ${weights:-?}: a small network that learned the"
echo "image-level labels of other generated shapes (weights/README.md); no mask is read in training"
bash run_train.sh scripts/train_voc.py "$devices" 1 auto "$tag" "config=${method}_shapes" output="$root/runs" resume=auto \
  ${settings[@]+"${settings[@]}"}
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
pictures    $run/pictures  (input, mask and the maps side by side)
curves      .venv/bin/python -m tensorboard.main --logdir $run/tensorboard
report      $run/report.html  (all of it on one page: open it in a browser)
END
