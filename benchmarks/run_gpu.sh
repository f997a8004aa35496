#!/usr/bin/env bash
# Every measurement of one GPU in one command and under 8 minutes: runs/gpu/figures.json, table.md, trace.json.
#   benchmarks/run_gpu.sh [--minutes 8] [--out DIR] [section.key=value ...]
set -euo pipefail
cd "$(dirname "$0")/.."
python=${PYTHON:-$([ -x .venv/bin/python ] && echo .venv/bin/python || echo python3)}
exec "$python" -m benchmarks.gpu "$@"
