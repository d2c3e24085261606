"""Export of a run's newest committed checkpoint as an encoder folder; needs neither GPU nor DeepSpeed."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from physio_dist import __version__, storage
from physio_dist.errors import UserError
from physio_dist.models.encoders.criss_cross import EncoderConfig, MaskedModel
from physio_dist.models.export import save_encoder
from physio_dist.runs.run_dir import PEOPLE_FILE
from physio_dist.training import checkpoint
from physio_dist.training.checkpoint import Checkpoint


def export(run: str, out: str, warn: Callable[[str], None], raw: bool = False) -> Checkpoint:
    """Write ``encoder.safetensors``, ``config.json``, ``people.json`` and a model card to ``out``.

    Args:
        run: URL of a run.
        out: URL of a folder.
        warn: called when the newest checkpoint is damaged and an older one is used.
        raw: export the weights themselves even if the run keeps their moving average (``train.ema``).

    Returns:
        The checkpoint that was exported.

    Raises:
        UserError: the run is not there or has no committed checkpoint.
        DataError: all of its checkpoints are damaged.
    """
    saved = checkpoint.newest(run, warn)
    if saved is None:
        names = storage.names(run)
        reason = "it has no committed checkpoint yet" if names else "there is nothing there"
        raise UserError(f"{run}: {reason}; give the folder run.dir/run.name of a run")
    model = MaskedModel(EncoderConfig(**saved.progress.encoder))
    average = None if raw else saved.ema
    model.load_state_dict({**saved.model, **(average or {})})
    metadata: dict[str, Any] = {
        **saved.progress.signal,
        "step": saved.progress.step,
        "samples_seen": saved.progress.samples,
        "weights": "moving average" if average else "as trained",
        "data_fingerprints": saved.progress.fingerprints,
        "physio_dist": __version__,
    }
    if (sources := _sources(run)) is not None:
        metadata["sources"] = sources
    files = save_encoder(model.encoder.eval(), metadata)
    files["README.md"] = _card(saved).encode()
    try:
        files[PEOPLE_FILE] = storage.read_bytes(storage.join(run, PEOPLE_FILE))
    except storage.NotFoundError:
        warn(f"{run} has no {PEOPLE_FILE}: the export cannot tell whose signals it was trained on")
        # A list that an earlier export has left is of other people.
        storage.remove(storage.join(out, PEOPLE_FILE))
    # config.json last: without it the folder is not an export.
    for name in sorted(files, key=lambda name: name == "config.json"):
        storage.write_bytes(storage.join(out, name), files[name])
    return saved


def _sources(run: str) -> list[str] | None:
    """Names of the corpora that a run was trained on; its pseudonyms identify people of these only."""
    try:
        indexes = storage.read_json(storage.join(run, "data.json"))["indexes"]
        return sorted({str(name) for index in indexes for name in index["sources"]})
    except (storage.NotFoundError, KeyError, TypeError):
        return None


def _card(saved: Checkpoint) -> str:
    progress, signal = saved.progress, saved.progress.signal
    shape = progress.encoder
    simulated = (
        "\n> **Trained on SIMULATED signals.** It shows that the system works and is of no use on real recordings.\n"
        if signal.get("simulated")
        else ""
    )
    return f"""# {str(signal["signal"]).upper()} encoder
{simulated}
A criss-cross transformer ({shape["layers"]} layers, {shape["d"]} features, {shape["heads"]} heads), pretrained by
reconstructing what a dual mask hid: stretches of time, and whole leads.

| | |
|---|---|
| Input | float `[batch, channel, patch, 200]`, units of {signal["unit_uv"]:g} uV, {signal["rate"]:g} Hz |
| Channels in training | {" ".join(signal["channels"])} |
| Output | features `[batch, channel, patch, {shape["d"]}]` |
| Steps | {progress.step} |
| Windows seen | {progress.samples} |
| Data | {", ".join(f"`{fingerprint[:12]}`" for fingerprint in progress.fingerprints)} (fingerprints) |

```python
from physio_dist import load_encoder

encoder = load_encoder("path/to/this/folder")
features = encoder(signals)  # valid=... leaves out leads that are off
```

`people.json` lists pseudonyms of the people whose signals it was trained on, so that they can be kept out of a test.

Not a medical device. It has not been evaluated for clinical use.
"""
