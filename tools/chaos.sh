#!/usr/bin/env bash
# Runs the chaos tier: `bash tools/chaos.sh [ROUNDS [pytest arguments]]`. Each round strikes runs on hosts with network
# namespaces (needs root) after other random steps; the rest of the tier runs once. Prints the table of
# docs/reliability.md.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

rounds=${1:-1}
[ $# = 0 ] || shift
bash tools/setup.sh test
venv=$(realpath "${PHYSIO_DIST_VENV:-.venv}")
export PATH="$venv/bin:$PATH"
table=$(mktemp)
trap 'rm -f "$table"' EXIT
failed=0
for ((round = 1; round <= rounds; round++)); do
    PHYSIO_DIST_CHAOS_TABLE=$table python -m pytest tests/system/test_hosts.py "$@" || failed=1
done
python -m pytest tests/system --ignore=tests/system/test_hosts.py -m chaos "$@" || [ $? = 5 ] || failed=1
echo
echo '| fault | noticed after | longest pause between steps | steps repeated | samples lost | loss apart |'
echo '|---|---|---|---|---|---|'
cat "$table"
exit "$failed"
