"""Resume: the checkpoint to start from, and whether it continues the same sequence of samples."""

from __future__ import annotations

from collections.abc import Callable

from physio_dist.errors import UserError
from physio_dist.models.encoders.criss_cross import EncoderConfig
from physio_dist.training import checkpoint
from physio_dist.training.checkpoint import Checkpoint
from physio_dist.training.collectives import broadcast
from physio_dist.training.source import TrainingSource


def find_checkpoint(run: str, source: str | None, first: bool, warn: Callable[[str], None]) -> Checkpoint | None:
    """The checkpoint to start from, the same on every rank; the first rank looks for it (a collective).

    Args:
        run: URL of the run.
        source: URL of a checkpoint or run to start from if the run has none of its own.
        first: whether this is the first rank.
        warn: called with a sentence about each damaged checkpoint.

    Raises:
        UserError: ``source`` has no committed checkpoint.
        DataError: all checkpoints are damaged.
    """
    newest: Checkpoint | None = None
    if first:
        newest = checkpoint.newest(run, warn)
        if newest is None and source is not None:
            url = source.rstrip("/")
            newest = checkpoint.read(url) if checkpoint.is_committed(url) else checkpoint.newest(url, warn)
            if newest is None:
                raise UserError(f"resume={source}: there is no committed checkpoint")
    chosen = broadcast(newest.url if newest else None)
    return newest if newest is not None or chosen is None else checkpoint.read(chosen)


def check_compatible(saved: Checkpoint, source: TrainingSource, encoder: EncoderConfig) -> None:
    """Refuse a checkpoint of another model, or one that does not continue the same sequence of samples.

    Raises:
        UserError: names what differs.
    """
    theirs, ours = dict(saved.progress.encoder), encoder.to_dict()
    differing = [f"{k}: {theirs.get(k)} there, {ours[k]} now" for k in ours if theirs.get(k) != ours[k]]
    if differing:
        raise UserError(f"{saved.url} holds another encoder ({'; '.join(differing)})")
    saved_channels, channels = saved.progress.signal.get("channels"), list(source.dataset.info.channels)
    if saved_channels != channels:
        raise UserError(f"{saved.url} was trained on the channels {saved_channels}, the data has {channels}")
    if saved.progress.fingerprints != source.fingerprints:
        raise UserError(
            f"{saved.url} was trained on other data (fingerprint {saved.progress.fingerprints[0][:12]}, now "
            f"{source.fingerprints[0][:12]}): its place in the order would mean nothing here. Choose another run.name"
        )
    if saved.progress.order != source.order_facts:
        raise UserError(
            f"{saved.url} took its samples in another order ({saved.progress.order} there, {source.order_facts} now): "
            "going on from it would repeat some and miss others"
        )
