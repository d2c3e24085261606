#!/usr/bin/env bash
# Installs what the tests need, then checks style, types and behaviour: `bash tools/test.sh [pytest arguments]`.
# With arguments it is pytest alone, in one process.
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
if [ $# != 0 ]; then
    echo '== pytest'
    exec python -m pytest "$@"
fi
# Both are run in any case, so that one start shows all that fails. Tests of whole runs are launched one by one: they
# fill the machine as it is, and two Ray clusters on one machine get in each other's way.
parts=0 system=0
echo '== pytest: the parts';  python -m pytest --ignore=tests/system --numprocesses 2 --dist loadfile || parts=$?
echo '== pytest: whole runs'; python -m pytest tests/system -m 'not chaos' || system=$?
if [ "$parts$system" != 00 ]; then
    echo "tools/test.sh: FAILED (exit status of the parts: $parts, of whole runs: $system)" >&2
    exit 1
fi
echo 'tools/test.sh: all passed'
