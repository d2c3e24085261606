#!/usr/bin/env bash
# Strikes runs on hosts of their own (network namespaces; needs root): `bash tools/chaos.sh [ROUNDS [pytest arguments]]`.
# Prints the table that docs/reliability.md shows. Each round draws anew the step after which a fault strikes.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

rounds=${1:-1}
[ $# = 0 ] || shift
bash tools/setup.sh test
venv=$(realpath "${PHYSIO_DIST_VENV:-.venv}")
table=$(mktemp)
trap 'rm -f "$table"' EXIT
failed=0
for ((round = 1; round <= rounds; round++)); do
    PATH="$venv/bin:$PATH" PHYSIO_DIST_CHAOS_TABLE=$table python -m pytest tests/system/test_hosts.py "$@" || failed=1
done
echo
echo '| fault | noticed after | longest pause between steps | steps repeated | samples lost | loss apart |'
echo '|---|---|---|---|---|---|'
cat "$table"
exit "$failed"
