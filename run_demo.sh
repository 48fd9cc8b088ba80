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
config=${method}_shapes
known=$(cd "$root/configs" && echo *_shapes.yaml)
if [[ " $known " != *" $config.yaml "* ]]; then
    echo "error: method=$method: there is no config $config, only ${known//.yaml/}" >&2
    exit 2
fi
run=$root/runs/$tag
SECONDS=0
bash "$root/utils/install.sh" requirements.txt
cd "$root"
devices=$(.venv/bin/python -c "import torch; print('0' if torch.cuda.is_available() else 'cpu')")
installed=$SECONDS

words=$(.venv/bin/python - "$config" <<'END'
import sys
from engine.config import load_config
from engine.inference.plan import evaluation_plan
from model import METHODS
config = load_config(sys.argv[1])
maps = ", ".join(kind.title for kind in evaluation_plan(config).kinds.values())
print(METHODS[config.method].__name__, config.model.weights, maps, sep="|")
END
)
IFS="|" read -r name start maps <<< "$words"
echo "training $name on generated shapes (config $config), from $start: a small network whose features"
echo "come from the image-level labels of other generated shapes (weights/README.md); no mask is read in training"
bash run_train.sh scripts/train_voc.py "$devices" 1 auto "$tag" config="$config" output="$root/runs" resume=auto \
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
pictures    $run/pictures  (input, mask, $maps side by side)
curves      .venv/bin/python -m tensorboard.main --logdir $run/tensorboard
report      $run/report.html  (all of it on one page: open it in a browser)
END
