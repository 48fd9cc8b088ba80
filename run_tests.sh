#!/usr/bin/env bash
# Installs what the tests need, builds the extension and runs all tests, two at a time; arguments go to pytest instead:
#     bash run_tests.sh tests/goldens -k par
set -euo pipefail
root=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
bash "$root/utils/install.sh" tests/requirements.txt
cd "$root"
.venv/bin/python -c "
import torch
from bilateralfilter import bilateral_filter
bilateral_filter(torch.zeros(1, 3, 2, 2), torch.zeros(1, 1, 2, 2), 15.0, 50.0)  # the first call builds it
"
if (($#)); then
  exec .venv/bin/python -m pytest "$@"
fi
# two files at a time, in the order of tests/conftest.py; a thread that waits gives its core away
OMP_WAIT_POLICY=PASSIVE exec .venv/bin/python -m pytest -n 2 --dist loadfile --no-loadscope-reorder
