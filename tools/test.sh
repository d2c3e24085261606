#!/usr/bin/env bash
# Installs what the tests need, then checks style, types and behaviour: `bash tools/test.sh [pytest arguments]`.
#
# PHYSIO_DIST_DATA  folder of real recordings (default: ../shared/data)
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

bash tools/setup.sh test
venv=$(realpath "${PHYSIO_DIST_VENV:-.venv}")
export PATH="$venv/bin:$PATH"

if [ $# = 0 ]; then
    echo '== ruff';  ruff check .
    echo '== mypy';  mypy
    echo '== shellcheck, hadolint'
    shellcheck tools/*.sh cluster/*.sh .ci/run
    hadolint Dockerfile
fi
echo '== pytest'
exec python -m pytest "$@"
