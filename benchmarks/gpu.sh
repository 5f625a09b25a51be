#!/usr/bin/env bash
# Checks and measures a GPU machine; installs nothing:  bash benchmarks/gpu.sh [--flags]   (see benchmarks/gpu.py)
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
python=.venv/bin/python
if [ ! -x "$python" ]; then python=python3; fi
export PYTORCH_NVML_BASED_CUDA_CHECK=1 # so that asking for CUDA does not start it: parts are forked
exec "$python" -m benchmarks.gpu "$@"
