"""Options under ``mask``: the dual mask of pretraining."""

from __future__ import annotations

from dataclasses import dataclass

from physio_dist.config.options import OneOf, Range, inside, option, run_checks
from physio_dist.errors import UserError

MASK_MODES = ("both", "alternating")
_RATIO = Range(0.0, 1.0, "it must be at least 0 and below 1", open_high=True)


@dataclass(frozen=True)
class MaskOptions:
    """Shares and shapes that the dual mask hides of a window (:mod:`physio_dist.objectives.dual_mask`).

    Raises:
        UserError: nothing or everything would be hidden, or options do not go together.
    """

    intra_ratio: float = option(0.5, "Share of the patches that is hidden in time, in each group of leads.", _RATIO)
    inter_ratio: float = option(
        0.3, "Probability that a lead, or the limb leads together, are hidden as a whole.", _RATIO
    )
    span: float | None = option(
        None,
        "Mean length in patches of the spans hidden in time; 0 or 1: scattered patches; `null`: one span in half of "
        "the samples, scattered patches in the others.",
        inside(0.0, 1e6),
    )
    mode: str = option(
        "both", "`both` parts in every sample, or `alternating`: each sample has one of the two.", OneOf(MASK_MODES)
    )
    lead_dropout: float = option(
        0.0, "Probability that a sample is shown with 8, 2 or 1 of its ECG leads only.", inside(0.0, 1.0)
    )

    def __post_init__(self) -> None:
        run_checks(self, "mask.")
        if self.intra_ratio == 0.0 and self.inter_ratio == 0.0:
            raise UserError("mask.intra_ratio and mask.inter_ratio are both 0: nothing would be hidden")
        if self.mode == "alternating" and 0.0 in (self.intra_ratio, self.inter_ratio):
            raise UserError("mask.mode=alternating needs mask.intra_ratio and mask.inter_ratio above 0")
        if self.lead_dropout > 0.0 and self.intra_ratio == 0.0:
            raise UserError("mask.lead_dropout needs mask.intra_ratio above 0: a lead alone can only be hidden in time")
