#!/usr/bin/env bash
# Builds the documentation site into site/; a broken link, a page without a place or an unknown API name fails:
# `bash tools/docs.sh [mkdocs arguments]`. `bash tools/docs.sh serve` shows it at http://127.0.0.1:8000 while you write.
set -euo pipefail
export NO_MKDOCS_2_WARNING=1  # advertises a successor
cd "$(dirname "${BASH_SOURCE[0]}")/.."

if ! command -v mkdocs >/dev/null; then
    bash tools/setup.sh docs
    venv=$(realpath "${PHYSIO_DIST_VENV:-.venv}")
    export PATH="$venv/bin:$PATH"
fi
if [ $# = 0 ]; then
    set -- build --strict --quiet
fi
exec mkdocs "$@"
