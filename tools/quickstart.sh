#!/usr/bin/env bash
# The whole job on this machine, from nothing to a report: `bash tools/quickstart.sh [--data DIR]`.
#
# Without --data the signals are SIMULATED. DIR holds ecg/, a folder of WFDB records, and, for the second half,
# paired/, a folder of EDF files with EEG and ECG and a recordings.csv (file,subject, then labels).
# PHYSIO_DIST_RANKS  processes that train together (default: the GPUs of this machine, or 2)
#
# Each stage prints a line with a progress bar; what pip, DeepSpeed and Ray print goes to runs/quickstart.log.
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

mkdir -p runs
log=$PWD/runs/quickstart.log
: > "$log"
venv=$(realpath -m "${PHYSIO_DIST_VENV:-.venv}")
export PATH="$venv/bin:$PATH"
watcher=
trap '[ -z "$watcher" ] || kill "$watcher" 2>/dev/null || true' EXIT

note() { printf '     %s\n' "$*"; }

# The newest "N of TOTAL things" or "step N/TOTAL" that a command has printed since line $1 of the log.
progress() {
    tail -n "+$1" "$log" | tr '\r' '\n' | grep -aoE '[0-9]+ of [0-9]+ [a-z]+|step [0-9]+/[0-9]+' | tail -n 1 |
        sed -E 's|step ([0-9]+)/([0-9]+)|\1 \2 steps|; s| of | |'
}

draw_progress() {  # draw_progress LINE: a bar on the terminal, redrawn until this process is ended
    local count total unit filled blank='------------------------------'
    while kill -0 $$ 2>/dev/null; do
        read -r count total unit < <(progress "$1") || { count=0 total=0 unit=; }
        filled=0
        [ "${total:-0}" = 0 ] || filled=$((30 * count / total))
        printf '\r     [%s%s] %4s s  %-22s' "$(printf '%*s' "$filled" '' | tr ' ' '#')" "${blank:filled}" \
            "$SECONDS" "$([ "${total:-0}" = 0 ] || echo "$count/$total $unit")"
        sleep 1
    done
}

fail() {  # fail STATUS LINE: show what the log has from that line on, and end
    printf '     FAILED, exit status %s\n\nThe last lines of %s:\n' "$1" "$log" >&2
    tail -n "+$2" "$log" | tail -n 20 | sed 's/^/    /' >&2
    exit "$1"
}

logged() {  # logged COMMAND...: as a stage that takes a moment only
    local line status=0
    line=$(($(wc -l < "$log") + 1))
    "$@" >> "$log" 2>&1 || status=$?
    [ "$status" = 0 ] || fail "$status" "$line"
}

stage() {  # stage TITLE COMMAND...: run a command with its output in the log; on failure show the log's end
    local title=$1 line status=0
    shift
    line=$(($(wc -l < "$log") + 1))
    echo "== $title: $*" >> "$log"
    SECONDS=0
    echo "$title"
    if [ -t 1 ]; then
        draw_progress "$line" &
        watcher=$!
    fi
    "$@" >> "$log" 2>&1 || status=$?
    if [ -n "$watcher" ]; then
        kill "$watcher" 2>/dev/null || true
        wait "$watcher" 2>/dev/null || true
        watcher=
        printf '\r\033[K'
    fi
    [ "$status" = 0 ] || fail "$status" "$line"
    note "done in $SECONDS s"
}

echo "The output of pip, DeepSpeed and Ray goes to $log"
stage '0/5  installing into '"$venv" bash tools/setup.sh

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
    read -r fingerprint windows < <(facts "$2") || return
    put_aside "runs/$1" data.json "$fingerprint"
    # Few recordings make a smaller batch, down to one window a process.
    while [ "$batch" -gt "$windows" ] && [ "$batch" -gt "$ranks" ]; do batch=$((batch / 2)); done
    deepspeed --num_gpus "$ranks" --log_level error physio_dist/pretrain.py --config configs/pretrain/quickstart.yaml \
        "run.name=$1" "data.index=$2" "train.global_batch=$batch" "${@:3}" &&
        physio-dist export "runs/$1" "runs/$1/encoder"
}

converted() { note "$(grep -aE '^[0-9]+ windows of [0-9]+ people' "$log" | tail -n 1)"; }

pretrained() {  # pretrained RUN: held-out errors beside those of predicting zero
    note "$(python -c '
import json, sys
lines = [json.loads(line) for line in open(sys.argv[1])]
line = next((line for line in reversed(lines) if line.get("val_loss") is not None), None)
if line is None:
    print("no held-out windows")
else:
    parts = [(name, line.get(f"val_{key}"), line.get(f"val_zero_{key}"))
             for name, key in (("patches in time", "intra"), ("whole leads", "inter"))]
    print("held-out error (predicting zero): " + ", ".join(
        f"{name} {value:.2f} ({zero:.2f})" for name, value, zero in parts if value is not None and zero is not None))
' "runs/$1/metrics.jsonl")"
}

results_table() {
    python -c '
import json, sys
def number(value):
    return "-" if value is None else f"{value:.3f}"
print("     " + "row".ljust(12) + " accuracy  ROC-AUC  95% interval")
for row in json.load(open(sys.argv[1]))["rows"]:
    name, accuracy, auc = row["name"], number(row["accuracy"]), number(row["auc"])
    low, high = map(number, row.get("auc_ci") or (None, None))
    print(f"     {name:<12} {accuracy:>8} {auc:>8}  {low} to {high}")
' runs/quickstart-fusion/results.json
}

if [ -n "$data" ]; then
    # A folder of its own for each state of the recordings.
    home=$(basename "$data")-$(find "$data" -type f -printf '%P %s %T@\n' | sort | cat - <(echo "$data") | sha256sum | cut -c1-8)
    ecg=runs/data/$home paired=runs/data/$home-paired
    convert=(wfdb "$data/ecg" --out "$ecg" split.test=0)
    title="recordings of $data/ecg -> shards"
else
    ecg=runs/data/simulated paired=runs/data/simulated-paired
    convert=(simulate 'people=300,windows=8,seed=0' --out "$ecg" samples_per_shard=400)
    title='SIMULATED 12-lead ECGs -> shards'
fi
stage "1/5  $title" physio-dist shard "${convert[@]}"
converted
logged physio-dist inspect "$ecg" --plot 2 "$ecg.png"

stage "2/5  pretraining an ECG encoder with DeepSpeed on $ranks processes" pretrain quickstart "$ecg"
pretrained quickstart

if [ -n "$data" ] && [ ! -d "$data/paired" ]; then
    logged physio-dist report runs/quickstart
    printf '\n%s has no folder paired/ with EEG and ECG of the same people: the second half is left out.\n' "$data"
    echo "The report: $PWD/runs/quickstart/report.html"
    exit 0
fi

if [ -n "$data" ]; then
    convert=(edf "$data/paired" --out "$paired" 'signals=ecg,eeg' leads=found eeg.channels=found split.test=0.33)
    title="EEG and ECG of $data/paired -> shards"
else
    convert=(simulate 'people=90,trials=4,windows=2,seed=1' --out "$paired" 'signals=ecg,eeg' split.test=0.33)
    title='SIMULATED EEG and ECG of other people, calm and aroused -> shards'
fi
stage "3/5  $title" physio-dist shard "${convert[@]}"
converted
logged physio-dist inspect "$paired"

stage "4/5  pretraining an EEG encoder, without the test people" pretrain quickstart-eeg "$paired" data.signal=eeg
pretrained quickstart-eeg

read -r fingerprint _ < <(facts "$paired")
hash_of() { python -c 'import json, sys; print(json.load(open(sys.argv[1]))["encoder_sha256"])' "$1/encoder/config.json"; }
put_aside runs/quickstart-fusion data.json \
    "$fingerprint" "$(hash_of runs/quickstart)" "$(hash_of runs/quickstart-eeg)"
stage '5/5  a sweep of fusion heads over both frozen encoders, on Ray' \
    python -m physio_dist.tune --config configs/tune/quickstart.yaml "tune.data=$paired" "tune.label=$label" \
    tune.encoders.ecg=runs/quickstart/encoder tune.encoders.eeg=runs/quickstart-eeg/encoder
results_table

logged physio-dist report runs/quickstart runs/quickstart-eeg runs/quickstart-fusion
echo
echo "The curves, also while a run goes on: $venv/bin/tensorboard --logdir runs"
echo "The report: $PWD/runs/quickstart/report.html"
