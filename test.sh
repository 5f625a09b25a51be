#!/usr/bin/env bash
# Sets up, then runs the tests:  bash test.sh [pytest arguments]
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")"
bash scripts/setup.sh dev
exec .venv/bin/python -m pytest "$@"
