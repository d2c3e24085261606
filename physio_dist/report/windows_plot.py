"""Windows of a shard set as one picture, for `physio-dist inspect --plot`."""

from __future__ import annotations

import io
from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from physio_dist.report.drawing import INK, SOFT, new_figure, style


def draw_windows(
    signal: NDArray[np.float32],
    valid: NDArray[np.bool_],
    channels: Sequence[str],
    rate: float,
    titles: Sequence[str],
    headline: str,
) -> bytes:
    """A PNG with one panel a window, its leads stacked in one scale.

    Args:
        signal: ``[window, channel, time]`` in microvolts.
        valid: ``[window, channel]``; an invalid lead is named and left empty.
        channels: lead names.
        rate: Hz.
        titles: one a window.
        headline: above all of them.
    """
    windows, leads, samples = signal.shape
    height = 0.32 * leads + 0.7
    with style():
        figure = new_figure(10.0, height * windows + 0.5)
        time = np.arange(samples) / rate
        for w in range(windows):
            top = 1 - (0.45 + w * height) / (height * windows + 0.5)
            share = (height - 0.65) / (height * windows + 0.5)
            axes: Any = figure.add_axes((0.07, top - share - 0.02, 0.91, share))
            heard = np.abs(signal[w][valid[w]]) if valid[w].any() else np.ones((1, 1))
            step = 2.2 * float(np.percentile(heard, 99.5)) or 1.0
            for lead in range(leads):
                base = -lead * step
                shown = bool(valid[w, lead])
                axes.text(-0.01 * samples / rate, base, channels[lead], ha="right", va="center",
                          fontsize=8, color=INK if shown else SOFT)  # fmt: skip
                if shown:
                    axes.plot(time, base + np.clip(signal[w, lead], -step, step), color=INK, lw=0.6)
                else:
                    axes.text(0.1, base, "not valid", va="center", fontsize=7, style="italic", color=SOFT)
            axes.set_xlim(0, samples / rate)
            axes.set_ylim(-(leads - 0.3) * step, 0.7 * step)
            axes.set_yticks([])
            axes.grid(axis="x", lw=0.3)
            axes.tick_params(labelsize=7)
            axes.set_title(f"{titles[w]}   (spacing of the leads {step / 1000:.2g} mV)", fontsize=8, loc="left")
        figure.text(0.07, 1 - 0.2 / (height * windows + 0.5), headline, fontsize=10, weight="bold")
        out = io.BytesIO()
        figure.savefig(out, format="png", dpi=110)
    return out.getvalue()
