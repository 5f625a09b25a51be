#!/usr/bin/env bash
# Sets up, then trains:  bash train.sh [CONFIG] [--flag value …]   (configs: configs/config_CONFIG.py)
# With several GPUs, torchrun starts a process for each; CUDA_VISIBLE_DEVICES=0 takes only the first.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")"
bash scripts/setup.sh
if [ $# -gt 0 ] && [[ "$1" != -* ]]; then set -- --config "$@"; fi
script=train_dual_tower.py
if [[ " $*" =~ \ --config[\ =](config[_-])?vanilla ]]; then script=train_vanilla.py; fi
gpus=0
if command -v nvidia-smi > /dev/null && [[ ! " $* " =~ \ (-h|--help|--dry[_-]run) ]]; then
    gpus=$(.venv/bin/python -c "import torch; print(torch.cuda.device_count())")
fi
if [ "$gpus" -gt 1 ]; then
    echo "train.sh: $gpus GPUs, one process for each"
    exec .venv/bin/python -m torch.distributed.run --standalone --nproc-per-node "$gpus" \
        --signals-to-handle SIGTERM,SIGINT,SIGUSR1 --shutdown-timeout 600 -- "$script" "$@"
fi
exec .venv/bin/python "$script" "$@"
