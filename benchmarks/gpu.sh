#!/usr/bin/env bash
# Measures all of the GPU path in ten minutes and fills the tables of docs/performance.md; --help says more:
#     bash benchmarks/gpu.sh [--out FILE.json] [--minutes 10] [--tiny]
set -euo pipefail
root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
source "$root/utils/python.sh"
exec "$python" "$root/benchmarks/gpu.py" "$@"
