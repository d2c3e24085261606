"""Controls of a study: noise in place of a signal, and permuted labels."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np

from physio_dist.evaluation.splits import permuted
from physio_dist.evaluation.trained_heads import Labelling, mean_probability, train_member
from physio_dist.evaluation.trials import Choice, Study, reductions_of
from physio_dist.runtime.arrays import FloatArray
from physio_dist.runtime.seeding import seed_of
from physio_dist.stats.scores import auc


def with_noise(study: Study, signal: str) -> Study:
    """Replace one signal's features by noise, drawn for each window."""
    inputs = {}
    for key, values in study.inputs.items():
        if key.signal == signal:
            seed = seed_of("noise", study.options.run.seed, *key)
            values = np.random.Generator(np.random.Philox(key=seed)).standard_normal(values.shape, dtype=np.float32)
        inputs[key] = values
    # Windows in which the signal is missing would carry information too.
    valid = {name: channels for name, channels in study.valid.items() if name != signal}
    components = max(study.options.search.components)
    reductions = reductions_of(inputs, study.encoders, study.folds, components, valid)
    return replace(study, inputs=inputs, valid=valid, reductions=reductions)


def permuted_label_aucs(study: Study, choices: Sequence[Choice], repeats: int) -> list[float]:
    """AUCs of the fused row's selected heads, trained and tested on labels permuted by recording within people.

    A study that leaks, through a person or a recording on both sides of a fold, stays above chance here. Folds and
    test windows stay as they are.

    Returns:
        One AUC over all test windows for each permutation in which it is defined.
    """
    seeds = [seed_of("control", study.options.run.seed, i) for i in range(repeats)]
    labellings = [Labelling(permuted(study.table, seed).label, f"/permuted/{i}") for i, seed in enumerate(seeds)]
    folds = [_fold_probability(study, choice, number, labellings) for number, choice in enumerate(choices)]
    rows = np.concatenate([fold.test for fold in study.folds])
    areas = [
        auc(labelling.label[rows], np.concatenate(probability))
        for labelling, probability in zip(labellings, zip(*folds, strict=True), strict=True)
    ]
    return [area for area in areas if area is not None]


def _fold_probability(study: Study, choice: Choice, number: int, labellings: Sequence[Labelling]) -> list[FloatArray]:
    """Probabilities ``[test row, class]`` of a fold for each labelling, means over inner splits and members."""
    test, inner = study.folds[number].test, len(study.folds[number].inner)
    members = []
    for member in choice.members:
        heads = [
            probability
            for trained in train_member(study, "fused", member, number, labellings)
            for probability in trained.probability([test] * len(trained.jobs))
        ]
        members.append([mean_probability(heads[low : low + inner]) for low in range(0, len(heads), inner)])
    return [mean_probability(probability) for probability in zip(*members, strict=True)]
