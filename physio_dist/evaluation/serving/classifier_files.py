"""Folder of a sweep's classifier: heads of every fold and one ensemble trained on everybody, with their encoders.

It also holds how raw signals become windows. Tensors and JSON; ``config.json``, written last, names all files with
their hashes: without it there is no classifier.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, replace
from typing import Any

import numpy as np
import safetensors.torch

from physio_dist import __version__, storage
from physio_dist.config.task import LEAKY
from physio_dist.data.convert.channels import spec_behind
from physio_dist.data.format.index import ShardSet
from physio_dist.errors import DataError, UserError
from physio_dist.evaluation.backbones import files_of, open_backbone
from physio_dist.evaluation.label_table import SIGNALS, label_name
from physio_dist.evaluation.splits import Fold, inner_splits
from physio_dist.evaluation.trained_heads import TrainedHeads, train_selected
from physio_dist.evaluation.trials import (
    Choice,
    EncoderRole,
    Study,
    TrialRecord,
    best_choice,
    reductions_of,
    train,
)
from physio_dist.models.fusion.head import Head
from physio_dist.models.fusion.heads import input_kind
from physio_dist.signals.windows import WindowSpec

KIND = "physio-dist-classifier"
FORMATS = (1, 2)
"""Format 2 marks classifiers that readers of format 1 would misread: ensembles with heads of several configurations,
and those that subtract a baseline period."""
CONFIG = "config.json"
FOLDER = "classifier"
"""Its folder in a sweep's directory."""
EVERYBODY = "everybody"
_ROW = "fused"
_RULES = {
    "latin_hypercube": "its configuration and epoch are those with the best AUC on validation people, the mean over "
    "all folds",
    "optuna": "of the configurations that folds selected it has the one, and the epoch, with the best AUC on "
    "validation people, who are groups of all",
}
_RULE = (
    "; groups of people take turns, each head is trained on all but one group. Nobody is left to test it on: what the "
    "fold models say of what they are tested on is the estimate"
)

_REST = {
    None: "nothing is subtracted",
    "fit": "the features of a rest before are subtracted, their mean over its windows with enough valid channels",
    "all": "the features of a rest before are subtracted, their mean over its windows",
}


def save_classifier(
    study: Study, records: Sequence[TrialRecord], fused: TrainedHeads, shards: ShardSet, url: str,
    say: Callable[[str], None],
) -> None:  # fmt: skip
    """Write the classifier of a finished study.

    Args:
        study: the inputs of the trials.
        records: of all trials.
        fused: the trained heads of the fused row.
        shards: index of the study's shard set.
        url: of the folder; its content is replaced.
        say: receives its location, or why raw recordings cannot be classified and there is none.

    Raises:
        DataError: an encoder is not the one any more that the study was made with.
    """
    storage.remove(url, recursive=True)
    window = spec_behind(shards)
    if window is None:
        say("no classifier is kept: the shard set does not tell how raw recordings become its windows")
        return
    say("keeping the fused heads of all folds, and training one ensemble on everybody")
    encoders, files = _encoders(study)
    ensembles: dict[str, dict[str, Any]] = {}
    for number, (fold, choice, heads) in enumerate(zip(study.folds, fused.choices, fused.heads, strict=True)):
        folders = {signal: of_folds[number] for signal, of_folds in encoders.items()}
        ensembles[fold.name] = _ensemble(fold.name, choice, heads, folders, files)
    try:
        everybody = _train_on_everybody(study, records, fused.choices)
        folders = {signal: of_folds[0] for signal, of_folds in encoders.items()}
        ensembles[EVERYBODY] = _ensemble(EVERYBODY, everybody.choices[0], everybody.heads[0], folders, files)
        ensembles[EVERYBODY]["rule"] = _RULES[study.options.tune.search] + _RULE
    except UserError as error:
        say(f"the classifier has no ensemble for everybody: {error}")
    tune = study.options.tune
    subtracts = tune.baseline != "none"
    about: dict[str, Any] = {
        "kind": KIND,
        "format": FORMATS[subtracts or any(ensemble["others"] for ensemble in ensembles.values())],
        "physio_dist": __version__,
        "task": tune.task,
        "label": label_name(tune.task, tune.label),
        "protocol": tune.protocol,
        "leaky": tune.protocol == LEAKY,
        "classes": list(study.table.classes),
        "simulated": study.table.simulated,
        "data": {"fingerprint": shards.fingerprint, "sources": list(shards.sources)},
        "window": asdict(window),
        # Windows of the baseline period that are averaged and subtracted: those that the shard set has.
        **({"rest": "fit" if shards.made_by["options"].get("unusable") == "drop" else "all"} if subtracts else {}),
        "ensembles": ensembles,
    }
    files["README.md"] = _card(about, window).encode()
    for name, data in files.items():
        storage.write_bytes(storage.join(url, name), data)
    about["files"] = {name: hashlib.sha256(data).hexdigest() for name, data in files.items()}
    storage.write_json(storage.join(url, CONFIG), {**about, "sha256": hash_of(about)})
    say(f"classifier: {url}; `physio-dist predict {url} FILE` puts it to use")


def hash_of(about: Mapping[str, Any]) -> str:
    """Hash of everything else in ``config.json``, which it holds under ``sha256``."""
    content = {name: value for name, value in about.items() if name != "sha256"}
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def best_over_folds(records: Sequence[TrialRecord], size: int = 1) -> Choice:
    """Select a configuration of the fused row by the mean AUC over all folds, and the next ``size`` - 1 ones.

    Raises:
        UserError: the AUC is defined nowhere.
    """
    candidates = [
        (-float(line["val_auc"]), int(line["epoch"]), json.dumps(record.config, sort_keys=True))
        for record in records if record.row == _ROW
        for line in record.history if math.isfinite(line["val_auc"])
    ]  # fmt: skip
    if not candidates:
        raise UserError(f"no trial of the row {_ROW!r} has a mean AUC over all folds")
    return best_choice(candidates, size)


def _train_on_everybody(study: Study, records: Sequence[TrialRecord], choices: Sequence[Choice]) -> TrainedHeads:
    """Select a configuration and train its heads as those of a fold without test people.

    Raises:
        UserError: the AUC is defined nowhere.
    """
    options, rows = study.options, np.arange(len(study.table.label))
    turns = inner_splits(study.table, rows, options.tune.val_folds, f"{options.run.seed}/inner/{EVERYBODY}")
    # With too few people to take turns, one head is trained on all of them.
    fold = Fold(EVERYBODY, rows[:0], turns or ((rows, rows),))
    # Configurations that Optuna proposed were tried in one fold only and have no mean over folds.
    again, size = options.tune.search == "optuna", options.tune.ensemble_size
    candidates = choices if again else [best_over_folds(records, size)]
    members = [member for choice in candidates for member in choice.members]
    kinds = dict.fromkeys(input_kind(member.config) for member in members)
    inputs = {key: study.inputs[key] for kind in kinds for key in study.keys_of(_ROW, kind, 0).values()}
    encoders = {role: hashes[:1] for role, hashes in study.encoders.items()}
    reductions = reductions_of(inputs, encoders, [fold], max(options.search.components), study.valid)
    everybody = replace(study, folds=(fold,), inputs=inputs, encoders=encoders, reductions=reductions)
    if again:
        configs = {json.dumps(member.config, sort_keys=True): member.config for member in members}
        records = [
            TrialRecord(text, _ROW, config, list(train(everybody, _ROW, config))) for text, config in configs.items()
        ]
    return train_selected(everybody, _ROW, [best_over_folds(records, size)])


def _ensemble(
    name: str, choice: Choice, heads: Sequence[Sequence[Head]], encoders: Mapping[str, str], files: dict[str, bytes]
) -> dict[str, Any]:
    """An ensemble in ``config.json``, from the heads of each of ``Choice.members``; their tensors go to ``files``."""
    file = f"heads-{name}.safetensors"
    flat = [head for of_member in heads for head in of_member]
    files[file] = safetensors.torch.save(
        {f"{i}.{key}": value.contiguous() for i, head in enumerate(flat) for key, value in head.state_dict().items()}
    )
    first, *others = [
        {
            "heads": len(of_member),
            "head": of_member[0].to_dict(),
            "config": member.config,
            "epoch": member.epoch,
            "val_auc": round(member.val_auc, 6),
        }
        for member, of_member in zip(choice.members, heads, strict=True)
    ]
    return {"file": file, **first, "others": others, "encoders": dict(encoders)}


def _encoders(study: Study) -> tuple[dict[str, list[str]], dict[str, bytes]]:
    """Folders of each signal's encoders, one for each fold, and the files of all encoders."""
    folders: dict[str, list[str]] = {}
    files: dict[str, bytes] = {}
    for signal in SIGNALS:
        hashes = study.encoders[EncoderRole(signal)]
        urls = study.options.tune.encoders[signal].urls([fold.name for fold in study.folds])
        several = len(set(hashes)) > 1
        folders[signal] = [f"{signal}-{sha256[:12]}" if several else signal for sha256 in hashes]
        for fold, sha256, folder in zip(study.folds, hashes, folders[signal], strict=True):
            if f"{folder}/{CONFIG}" in files:
                continue
            backbone = open_backbone(urls[fold.name], signal)
            if backbone.sha256 != sha256:
                raise DataError(f"{backbone.url} has changed since this sweep began; choose another run.name")
            files |= {f"{folder}/{name}": data for name, data in files_of(backbone).items()}
    return folders, files


def needed(window: WindowSpec) -> str:
    """Channels that a recording has to have, in words."""
    each = [f"{name.upper()} {' '.join(window.channels_of(name))}" for name in window.signals]
    return "; ".join(each)


def _card(about: Mapping[str, Any], window: WindowSpec) -> str:
    warnings = []
    if about["simulated"]:
        warnings.append("**Trained on SIMULATED signals.** It shows that the system works and says nothing of people.")
    if about["leaky"]:
        warnings.append("**LEAKY SPLIT.** Its figures hold for nobody but the people it was trained on.")
    banner = "".join(f"\n> {line}\n" for line in warnings)
    bands = "; ".join(
        f"{name.upper()} {band[0]:g} to {band[1]:g} Hz"
        for name, band in (("ecg", window.band), ("eeg", window.eeg_band)) if name in window.signals
    )  # fmt: skip
    folds = [name for name in about["ensembles"] if name != EVERYBODY]
    everybody = f" `{EVERYBODY}`: {about['ensembles'][EVERYBODY]['rule']}." if EVERYBODY in about["ensembles"] else ""
    first = sorted(set(about["ensembles"].get(EVERYBODY, {}).get("encoders", {}).values()) - set(SIGNALS))
    if first:
        everybody += f" Folds have encoders of their own; it stands on those of fold {folds[0]}: {', '.join(first)}."
    return f"""# Fusion classifier: {about["label"]}
{banner}
| | |
|---|---|
| Tells apart | {", ".join(about["classes"])} (`{about["task"]}`) |
| Protocol | `{about["protocol"]}` |
| Takes | {needed(window)} |
| Windows | {window.seconds:g} s at {window.rate} Hz; {bands} |
| Rest | {_REST[about.get("rest")]} |
| Data | `{about["data"]["fingerprint"][:12]}` ({", ".join(about["data"]["sources"])}) |

Heads over frozen encoders, which lie beside them. Fold models {", ".join(folds)} are those of the sweep's `{_ROW}`
row; what a fold is tested on has neither trained nor selected its heads.{everybody}

```
physio-dist predict path/to/this/folder FILE.edf
```

Not a medical device. It has not been evaluated for clinical use.
"""
