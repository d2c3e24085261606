"""The part of a sweep's options that is about data: labels, protocol and folds."""

from __future__ import annotations

from dataclasses import dataclass

from physio_dist.config.options import OneOf, at_least, one_of, option
from physio_dist.errors import UserError

TASKS = ("labels", "eegmat", "dreamer")
RATINGS = ("valence", "arousal", "dominance")
"""Ratings of DREAMER's subjects, from 1 to 5."""

BY_CLIP = ("clip_disjoint", "person_and_clip")
LEAKY = "leaky_window"
PROTOCOLS = ("grouped_kfold", "loso", "holdout", *BY_CLIP, LEAKY)
SHARED_PEOPLE = ("clip_disjoint", LEAKY)
"""Protocols in which a subject may both train and be tested."""


@dataclass
class TaskOptions:
    """Labels, protocol and folds."""

    task: str = option(
        "labels",
        "`labels`: classes are the values of the label; `eegmat`: rest (0) against arithmetic (1), or with "
        "`label=counter` bad (0) against good (1); `dreamer`: low (0) against high (1) valence, arousal or dominance.",
        OneOf(TASKS),
    )
    label: str | None = option(None, "Name of the label; `eegmat` has a default.")
    neutral: str = option(
        "low", "For `dreamer`: a rating of 3, the middle of the scale, is high, is low, or is left out (`drop`).",
        OneOf(("high", "low", "drop")),
    )  # fmt: skip
    baseline: str = option(
        "none",
        "For `dreamer`: `subtract` the features of the baseline period before a clip from those of the clip's windows.",
        OneOf(("none", "subtract")),
    )
    protocol: str = option(
        "grouped_kfold",
        "How windows are split: `loso` leaves one subject out, `holdout` tests on the shard set's test split, "
        "`leaky_window` splits windows at random and marks its results as leaky.",
        OneOf(PROTOCOLS),
    )
    folds: int = option(5, "Number of folds.", at_least(2))
    clip: str | None = option(None, "Label that names the clip (film, stimulus) of a window; default `clip`.")
    val_folds: int = option(
        3, "Groups of training subjects that take turns as validation subjects, on which configurations are selected.",
        at_least(2),
    )  # fmt: skip

    @property
    def clip_name(self) -> str:
        """Label that names clips; empty if neither protocol nor baseline needs it."""
        needed = self.protocol in BY_CLIP or self.baseline != "none"
        return (self.clip or "clip") if needed else ""

    def validate(self) -> None:
        """Refuse options that do not go together.

        Raises:
            UserError: names the option.
        """
        if self.task == "labels" and not self.label:
            raise UserError("tune.task=labels needs tune.label, the name of a label of the shard set")
        if self.task == "dreamer":
            if not self.label:
                raise UserError(f"tune.task=dreamer needs tune.label: {', '.join(RATINGS)}")
            one_of("tune.label", self.label, RATINGS)
        elif self.baseline != "none":
            raise UserError(
                f"tune.baseline={self.baseline} is for tune.task=dreamer, whose clips have a rest before them"
            )
