#!/usr/bin/env bash
# Makes .venv from a lock file where it is missing or older than the lock; does nothing when all is in place.
# Called from the repository's root by train.sh and evaluate.sh (requirements.lock), and by test.sh
# (setup.sh dev: requirements-dev.lock, which holds the former's packages and those of tests).
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
stamp=.venv/installed.lock
cmp -s requirements-dev.lock "$stamp" && exit 0
lock=requirements-dev.lock
if [ "${1:-}" != dev ]; then
  lock=requirements.lock
  cmp -s "$lock" "$stamp" && exit 0
fi

python=""
for name in python3 python3.13 python3.12 python3.11 python; do
  if command -v "$name" >/dev/null && "$name" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; then python=$name; break; fi
done
if [ -z "$python" ]; then echo "error: Python 3.11 or newer is needed; none was found on PATH" >&2; exit 1; fi
if [ -x .venv/bin/python ]; then echo "setup: updating .venv to $lock"; else echo "setup: making .venv with $("$python" --version)"; fi
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
echo "setup: installing $(grep -c '^[a-z0-9]' "$lock") packages of $lock (PyTorch with its CUDA libraries takes some 5 GB)"
"$uv" pip sync --quiet --compile-bytecode --python .venv/bin/python --require-hashes "$lock"
cp "$lock" "$stamp"
echo "setup: done"
