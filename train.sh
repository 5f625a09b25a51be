#!/usr/bin/env bash
# Sets up, then trains:  bash train.sh [CONFIG] [--flag value …]   (configs: configs/config_CONFIG.py)
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")"
bash scripts/setup.sh
if [ $# -gt 0 ] && [[ "$1" != -* ]]; then set -- --config "$@"; fi
script=train_dual_tower.py
if [[ " $*" =~ \ --config[\ =](config[_-])?vanilla ]]; then script=train_vanilla.py; fi
exec .venv/bin/python "$script" "$@"
