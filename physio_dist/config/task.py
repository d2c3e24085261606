"""What is told apart and who is tested: the part of a sweep's options that is about data, and its checks."""

from __future__ import annotations

from dataclasses import dataclass

from physio_dist.config.loader import one_of
from physio_dist.errors import UserError

TASKS = ("labels", "eegmat", "dreamer")
RATINGS = ("valence", "arousal", "dominance")
"""What DREAMER's people rated, from 1 to 5."""

BY_CLIP = ("clip_disjoint", "person_and_clip")
LEAKY = "leaky_window"
PROTOCOLS = ("grouped_kfold", "loso", "holdout", *BY_CLIP, LEAKY)
SHARED_PEOPLE = ("clip_disjoint", LEAKY)
"""Protocols in which a person may both train and be tested."""


@dataclass
class TaskOptions:
    # labels: classes are the values that the label takes; eegmat: rest (0) against arithmetic (1), or with the label
    # counter bad (0) against good (1); dreamer: low (0) against high (1) valence, arousal or dominance.
    task: str = "labels"
    # Name of the label; eegmat has a default.
    label: str | None = None
    # Of dreamer: a rating of 3, the middle of the scale, is high, is low, or its windows are left out (drop).
    neutral: str = "low"
    # Of dreamer: subtract takes from the features of a window those of the rest before its clip; none leaves them.
    baseline: str = "none"
    # grouped_kfold, loso (one person a fold), holdout (the shard set's test split), clip_disjoint, person_and_clip; or
    # leaky_window, which divides single windows at random and says so wherever its results stand.
    protocol: str = "grouped_kfold"
    folds: int = 5
    # Label that tells which clip (film, stimulus) a window is of; clip where none is given.
    clip: str | None = None
    # Groups of training people that take turns as validation people, on which configurations are selected.
    val_folds: int = 3

    @property
    def clip_name(self) -> str:
        """Of the label that tells clips apart; empty where nothing asks for clips."""
        asked = self.protocol in BY_CLIP or self.baseline != "none"
        return (self.clip or "clip") if asked else ""


def check_task(options: TaskOptions) -> None:
    """Refuse values that fit no data.

    Raises:
        UserError: an unknown word, or options that do not go together.
    """
    one_of("tune.task", options.task, TASKS)
    one_of("tune.protocol", options.protocol, PROTOCOLS)
    one_of("tune.neutral", options.neutral, ("high", "low", "drop"))
    one_of("tune.baseline", options.baseline, ("none", "subtract"))
    if options.task == "labels" and not options.label:
        raise UserError("tune.task=labels needs tune.label, the name of a label of the shard set")
    if options.task == "dreamer":
        if not options.label:
            raise UserError(f"tune.task=dreamer needs tune.label: {', '.join(RATINGS)}")
        one_of("tune.label", options.label, RATINGS)
    elif options.baseline != "none":
        raise UserError(
            f"tune.baseline={options.baseline} is for tune.task=dreamer, whose clips have a rest before them"
        )
