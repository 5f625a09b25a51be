#!/usr/bin/env bash
# Makes .venv from requirements.lock where it is missing or older than the lock; does nothing when all is in place.
# Called by train.sh, evaluate.sh and test.sh from the repository's root.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
stamp=.venv/requirements.lock.installed
cmp -s requirements.lock "$stamp" && exit 0

python=""
for name in python3 python3.13 python3.12 python3.11 python; do
  if command -v "$name" >/dev/null && "$name" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; then python=$name; break; fi
done
if [ -z "$python" ]; then echo "error: Python 3.11 or newer is needed; none was found on PATH" >&2; exit 1; fi
if [ -x .venv/bin/python ]; then echo "setup: requirements.lock has changed, updating .venv"; else echo "setup: making .venv with $("$python" --version)"; fi
[ -x .venv/bin/python ] || "$python" -m venv .venv
rm -f "$stamp"
if command -v uv >/dev/null; then uv=uv; else
  uv=.venv/bootstrap/bin/uv
  if [ ! -x "$uv" ]; then
    echo "setup: installing uv into .venv/bootstrap"
    "$python" -m venv .venv/bootstrap
    .venv/bootstrap/bin/python -m pip install --quiet --disable-pip-version-check "uv>=0.9"
  fi
fi
echo "setup: installing $(grep -c '^[a-z0-9]' requirements.lock) packages (PyTorch with its CUDA libraries takes some 5 GB)"
"$uv" pip sync --quiet --compile-bytecode --python .venv/bin/python --require-hashes requirements.lock
cp requirements.lock "$stamp"
echo "setup: done"
