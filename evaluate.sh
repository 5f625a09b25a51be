#!/usr/bin/env bash
# Sets up, then evaluates:  CHECKPOINT=runs/NAME/model TASKS=easy_vqa BATCH_SIZE=32 bash evaluate.sh [--flag value …]
# Without TASKS it is MMStar, whose data come from the Hub, or from a copy: --data-root DIR. easy_vqa, synthetic and openmoji_captions need no network.
# Without CHECKPOINT it takes the model that was exported last. Results: evaluation/ beside the model folder, or under runs/ for a Hub id.
set -euo pipefail
[ -z "${CHECKPOINT:-}" ] || [ ! -e "$CHECKPOINT" ] || CHECKPOINT=$(realpath "$CHECKPOINT")
cd "$(dirname "${BASH_SOURCE[0]}")"
bash scripts/setup.sh
checkpoint=${CHECKPOINT:-$(ls -td runs/*/model 2>/dev/null | head -n 1 || true)}
if [ -z "$checkpoint" ]; then echo "error: no model under runs/: train one with 'bash train.sh', or set CHECKPOINT=DIR" >&2; exit 2; fi
folder=$checkpoint; [ ! -f "$checkpoint" ] || folder=$(dirname "$checkpoint")
if [ -d "$folder" ]; then output=$(dirname "$folder")/evaluation; else output=runs/evaluation_${checkpoint//\//_}; fi
[ "$(basename "$folder")" = model ] || [ ! -d "$folder" ] || output+=_$(basename "$folder")
exec .venv/bin/python evaluation.py --model "$checkpoint" --tasks "${TASKS:-mmstar}" --batch_size "${BATCH_SIZE:-32}" --output "$output" "$@"
