#!/usr/bin/env bash
# The whole job on this machine, from nothing to a report: `bash tools/quickstart.sh [--data DIR]`.
#
# Without --data the signals are SIMULATED. DIR holds ecg/, a folder of WFDB records, and, for the second half,
# paired/, a folder of EDF files with EEG and ECG and a recordings.csv (file,subject, then labels).
# PHYSIO_DIST_RANKS  processes that train together (default: the GPUs of this machine, or 2)
set -euo pipefail

usage() { echo "usage: bash tools/quickstart.sh [--data DIR]" >&2; exit 2; }
data=
while [ $# -gt 0 ]; do
    [ "$1" = --data ] && [ -n "${2:-}" ] || usage
    # Before the folder is left that it is relative to.
    data=$(realpath -m -- "$2"); shift 2
done
cd "$(dirname "${BASH_SOURCE[0]}")/.."
if [ -n "$data" ] && [ ! -d "$data/ecg" ]; then
    echo "quickstart: $data has no folder ecg/ with WFDB records" >&2
    exit 2
fi
if [ -n "$data" ] && [ -d "$data/paired" ] && [ ! -f "$data/paired/recordings.csv" ]; then
    echo "quickstart: $data/paired has no recordings.csv (columns file,subject, then labels)" >&2
    exit 2
fi

bash tools/setup.sh
venv=$(realpath "${PHYSIO_DIST_VENV:-.venv}")
export PATH="$venv/bin:$PATH"

say() { printf '\n\033[1m== %s\033[0m\n' "$*"; }
if [ -n "${PHYSIO_DIST_RANKS:-}" ]; then
    ranks=$PHYSIO_DIST_RANKS
else
    ranks=$(nvidia-smi --list-gpus 2>/dev/null | grep -c '^GPU') || ranks=2
fi

# The label that is told apart is the table's first column that is neither file nor subject.
label=arousal
if [ -n "$data" ] && [ -d "$data/paired" ]; then
    label=$(python -c '
import csv, sys
columns = next(csv.reader(open(sys.argv[1], newline="", encoding="utf-8-sig")), [])
print(next((name for name in map(str.strip, columns) if name and name not in ("file", "subject")), ""))
' "$data/paired/recordings.csv")
    if [ -z "$label" ]; then
        echo "quickstart: $data/paired/recordings.csv has no column of labels beside file and subject" >&2
        exit 2
    fi
fi

# A run knows its data; one made from other data is put aside, not written over.
put_aside() {  # put_aside RUN FILE WORDS...: where FILE is in RUN and does not hold every one of WORDS
    local run=$1 file=$1/$2 word n=1
    [ -d "$run" ] || return 0
    for word in "${@:3}"; do
        grep -qs -- "$word" "$file" && continue
        while [ -e "$run-old-$n" ]; do n=$((n + 1)); done
        mv "$run" "$run-old-$n"
        return 0
    done
}

facts() {  # facts SHARDS: fingerprint, windows to train on
    python -c '
import json, sys
ours = json.load(open(sys.argv[1]))["physio_dist"]
print(ours["fingerprint"], ours["splits"]["train"])' "$1/index.json"
}

pretrain() {  # pretrain RUN SHARDS OPTIONS...
    local fingerprint windows batch=64
    read -r fingerprint windows < <(facts "$2")
    put_aside "runs/$1" data.json "$fingerprint"
    # Few recordings make a smaller batch, down to one window a process.
    while [ "$batch" -gt "$windows" ] && [ "$batch" -gt "$ranks" ]; do batch=$((batch / 2)); done
    deepspeed --num_gpus "$ranks" --log_level error physio_dist/pretrain.py --config configs/pretrain/quickstart.yaml \
        "run.name=$1" "data.index=$2" "train.global_batch=$batch" "${@:3}"
    physio-dist export "runs/$1" "runs/$1/encoder"
}

if [ -n "$data" ]; then
    # A folder of its own for each state of the recordings.
    home=$(basename "$data")-$(find "$data" -type f -printf '%P %s %T@\n' | sort | cat - <(echo "$data") | sha256sum | cut -c1-8)
    ecg=runs/data/$home paired=runs/data/$home-paired
    say "1/5  recordings of $data/ecg -> shards"
    physio-dist shard wfdb "$data/ecg" --out "$ecg" split.test=0
else
    ecg=runs/data/simulated paired=runs/data/simulated-paired
    say "1/5  SIMULATED 12-lead ECGs -> shards"
    physio-dist shard simulate people=300,windows=8,seed=0 --out "$ecg" samples_per_shard=400
fi
physio-dist inspect "$ecg" --plot 2 "$ecg.png"

say "2/5  an ECG encoder, pretrained on $ranks processes: deepspeed physio_dist/pretrain.py"
pretrain quickstart "$ecg"

if [ -n "$data" ] && [ ! -d "$data/paired" ]; then
    physio-dist report runs/quickstart
    printf '\n%s has no folder paired/ with EEG and ECG of the same people: the second half is left out.\n' "$data"
    echo "The report: $PWD/runs/quickstart/report.html"
    exit 0
fi

if [ -n "$data" ]; then
    say "3/5  EEG and ECG of $data/paired -> shards"
    physio-dist shard edf "$data/paired" --out "$paired" signals=ecg,eeg leads=found eeg.channels=found split.test=0.33
else
    say "3/5  SIMULATED EEG and ECG of other people, calm and aroused -> shards"
    physio-dist shard simulate people=90,trials=4,windows=2,seed=1 --out "$paired" signals=ecg,eeg split.test=0.33
fi
physio-dist inspect "$paired"

say "4/5  an EEG encoder, pretrained on the people who are not kept for the test"
pretrain quickstart-eeg "$paired" data.signal=eeg

say "5/5  both encoders frozen, their features concatenated, a sweep of heads on Ray: python -m physio_dist.tune"
read -r fingerprint _ < <(facts "$paired")
hash_of() { python -c 'import json, sys; print(json.load(open(sys.argv[1]))["encoder_sha256"])' "$1/encoder/config.json"; }
put_aside runs/quickstart-fusion data.json \
    "$fingerprint" "$(hash_of runs/quickstart)" "$(hash_of runs/quickstart-eeg)"
python -m physio_dist.tune --config configs/tune/quickstart.yaml "tune.data=$paired" "tune.label=$label" \
    tune.ecg_encoder=runs/quickstart/encoder tune.eeg_encoder=runs/quickstart-eeg/encoder

physio-dist report runs/quickstart runs/quickstart-eeg runs/quickstart-fusion
echo
echo "The curves, also while a run goes on: $venv/bin/tensorboard --logdir runs"
echo "The report: $PWD/runs/quickstart/report.html"
