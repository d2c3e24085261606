#!/usr/bin/env bash
# Checks style, types, docs and behaviour: `bash tools/test.sh [--fast] [pytest arguments]`.
#
# --fast                      ruff and the unit tier; nothing but Python packages is needed
# pytest arguments            pytest alone, in one process
# PHYSIO_DIST_DATA            folder of real recordings (default: ../shared/data)
# PHYSIO_DIST_REQUIRE_DATA=1  tests whose recordings, programs or rights are missing fail; otherwise they are reported
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

tier='not chaos' fast=
if [ "${1:-}" = --fast ]; then
    tier=unit fast=1
    shift
fi
bash tools/setup.sh test
venv=$(realpath "${PHYSIO_DIST_VENV:-.venv}")
export PATH="$venv/bin:$PATH"

if [ $# != 0 ]; then
    exec python -m pytest -m "$tier" "$@"
fi
echo '== ruff'
ruff check .
ruff format --check .
if [ -n "$fast" ]; then
    echo '== pytest: the unit tier'
    exec python -m pytest -m unit --ignore=tests/system --numprocesses 2 --dist loadfile
fi
echo '== mypy'
mypy
echo '== shellcheck, hadolint'
shellcheck tools/*.sh cluster/*.sh .ci/run
hadolint Dockerfile
if [ -f tools/docs.sh ]; then
    echo '== docs'
    bash tools/docs.sh
fi
echo '== pytest: all tiers but chaos'
exec python -m pytest -m "$tier" --numprocesses 2 --dist loadgroup --no-loadscope-reorder
