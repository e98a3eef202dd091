#!/usr/bin/env bash
# What this project does on one GPU, in one command and under eight minutes; a table at the end, and a CSV file.
#
#   bash benchmarks/gpu.sh [OUT.csv] [flags of bench_gpu.py]
#
# It needs what requirements.txt lists, in .venv (make test), or in the Python of $PYTHON.
set -euo pipefail

cd "$(dirname "${BASH_SOURCE[0]}")/.."
out=${1:-results/bench_gpu.csv}
shift || true
if [[ -z ${PYTHON-} ]]; then
    PYTHON=python3
    [[ -x .venv/bin/python ]] && PYTHON=.venv/bin/python
fi
exec "$PYTHON" benchmarks/bench_gpu.py --out "$out" "$@"
