#!/usr/bin/env bash
# The whole job on this machine, from nothing to a report: `bash tools/quickstart.sh [--data DIR]`.
#
# Without --data the signals are SIMULATED. DIR holds ecg/, a folder of WFDB records.
# PHYSIO_DIST_RANKS  processes that train together (default: the GPUs of this machine, or 2)
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

data=
while [ $# -gt 0 ]; do
    case $1 in
        --data) data=${2:?"--data needs a folder"}; shift 2 ;;
        *) echo "usage: bash tools/quickstart.sh [--data DIR]" >&2; exit 2 ;;
    esac
done
if [ -n "$data" ] && [ ! -d "$data/ecg" ]; then
    echo "quickstart: $data has no folder ecg/ with WFDB records" >&2
    exit 2
fi

bash tools/setup.sh
venv=$(realpath "${PHYSIO_DIST_VENV:-.venv}")
export PATH="$venv/bin:$PATH"

say() { printf '\n\033[1m== %s\033[0m\n' "$*"; }
if [ -n "${PHYSIO_DIST_RANKS:-}" ]; then
    ranks=$PHYSIO_DIST_RANKS
elif command -v nvidia-smi >/dev/null 2>&1; then
    ranks=$(nvidia-smi --list-gpus | wc -l)
else
    ranks=2
fi

if [ -n "$data" ]; then
    say "1/4  recordings of $data/ecg -> shards"
    shards=runs/data/$(basename "$(realpath "$data")")-$(realpath "$data" | sha256sum | cut -c1-8)
    physio-dist shard wfdb "$data/ecg" --out "$shards" split.test=0
else
    say "1/4  SIMULATED recordings -> shards"
    shards=runs/data/simulated
    physio-dist shard simulate people=300,windows=8,seed=0 --out "$shards" samples_per_shard=400
fi
physio-dist inspect "$shards" --plot 2 "$shards.png"

say "2/4  pretraining on $ranks processes: deepspeed physio_dist/pretrain.py"
# A run knows its data; one made from other data is put aside, not written over.
read -r fingerprint windows < <(python -c '
import json, sys
ours = json.load(open(sys.argv[1]))["physio_dist"]
print(ours["fingerprint"], ours["splits"]["train"])' "$shards/index.json")
if [ -d runs/quickstart ] && ! grep -qs "$fingerprint" runs/quickstart/data.json; then
    n=1; while [ -e "runs/quickstart-old-$n" ]; do n=$((n + 1)); done
    mv runs/quickstart "runs/quickstart-old-$n"
fi
# Few recordings make a smaller batch, down to one window a process.
batch=64
while [ "$batch" -gt "$windows" ] && [ "$batch" -gt "$ranks" ]; do batch=$((batch / 2)); done
deepspeed --num_gpus "$ranks" --log_level error physio_dist/pretrain.py --config configs/pretrain/quickstart.yaml \
    "data.index=$shards" "train.global_batch=$batch"

say "3/4  the encoder, for others to load"
physio-dist export runs/quickstart runs/quickstart/encoder

say "4/4  the report"
physio-dist report runs/quickstart
echo
echo "The curves, also while a run goes on: $venv/bin/tensorboard --logdir runs"
echo "The report: $PWD/runs/quickstart/report.html"
