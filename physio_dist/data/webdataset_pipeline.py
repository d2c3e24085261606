"""A stock ``webdataset`` pipeline over our shards, for people with a training loop of their own."""

from __future__ import annotations

import io
import json
from collections.abc import Iterable, Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from physio_dist import storage
from physio_dist.data.format.index import SPLITS, ShardSet, open_set
from physio_dist.data.format.sample_table import SampleTable, read_sample_table
from physio_dist.errors import UserError
from physio_dist.runtime.arrays import Int64Array

if TYPE_CHECKING:
    import webdataset


def webdataset_pipeline(
    url: str, split: str = "train", shuffle_shards: int = 0, shuffle_samples: int = 0, seed: int = 0
) -> webdataset.compat.FluidWrapper:
    """Stream the decoded samples of a split.

    Shards are divided among the ranks of ``torch.distributed``, if it is initialized, and the workers of a
    ``DataLoader``, so at least as many shards as workers are needed. The pipeline has webdataset's fluent interface
    (``map``, ``shuffle``, ``to_tuple``, ``batched``, ...). Nothing in a shard is unpickled.

    This order has none of the guarantees of ``physio-dist`` runs: it depends on the numbers of ranks and workers, and
    cannot be resumed. Hashes are not checked; ``physio-dist verify`` does that.

    Args:
        url: the shard set, local or remote, with or without ``/index.json``.
        split: ``train``, ``val`` or ``test``, as the sample table has it.
        shuffle_shards: shards in the shuffle buffer, another order in each epoch; 0 keeps the order of the index.
        shuffle_samples: samples in the shuffle buffer; 0 keeps the order of the shards.
        seed: of the shuffling of shards.

    Returns:
        A ``webdataset`` pipeline of dictionaries: ``__key__``; for each signal ``ecg`` or ``eeg``, float32 ``[channel,
        time]`` in microvolts, and ``ecg.valid`` or ``eeg.valid``, bool ``[channel]``; ``labels``, a dictionary; and
        ``json``, everything that the shard says of the sample.

    Raises:
        UserError: there is no shard set, an unknown split, or one without samples.
        DataError: index or sample table are damaged.
    """
    import webdataset as wds
    from webdataset import tariterators
    from webdataset.filters import pipelinefilter

    if split not in SPLITS:
        raise UserError(f"split={split}: expected one of {', '.join(SPLITS)}")
    shards = open_set(url)
    table = read_sample_table(shards)
    samples = np.flatnonzero(table.split == SPLITS.index(split))
    if not len(samples):
        raise UserError(f"{shards.url} has no samples in its {split} split")
    numbers = np.unique(np.searchsorted(shards.shard_starts(), samples, side="right") - 1)
    pipeline = wds.compat.FluidWrapper(wds.SimpleShardList([shards.shard_url(int(number)) for number in numbers]))
    if shuffle_shards:
        # Before they are divided, so that all ranks and workers, which have the same seed, divide the same order.
        pipeline.append(wds.detshuffle(shuffle_shards, seed=seed))
    pipeline.append(wds.split_by_node)
    pipeline.append(wds.split_by_worker)
    pipeline.append(_open_shards)
    pipeline.append(pipelinefilter(tariterators.tar_file_expander)())
    pipeline.append(pipelinefilter(tariterators.group_by_keys)())
    pipeline.append(partial(_decode_split, _rows_by_key(table, samples), shards))
    if shuffle_samples:
        pipeline.append(wds.shuffle(shuffle_samples))
    return pipeline


def _rows_by_key(table: SampleTable, samples: Int64Array) -> dict[str, dict[str, Any]]:
    """The valid channels of each sample of the split, by its key."""
    valid = {signal: flags[samples] for signal, flags in table.valid.items()}
    return {
        key: {f"{signal}.valid": flags[row] for signal, flags in valid.items()}
        for row, key in enumerate(table.keys(samples))
    }


def _open_shards(sources: Iterable[dict[str, Any]]) -> Iterator[dict[str, Any]]:
    """Open shards where they lie: local ones as files, remote ones fetched whole."""
    for source in sources:
        url = source["url"]
        if storage.is_local(url):
            with Path(storage.local_path(url)).open("rb") as stream:
                yield {**source, "stream": stream}
        else:
            yield {**source, "stream": io.BytesIO(storage.read_bytes(url))}


def _decode_split(
    rows: Mapping[str, dict[str, Any]], shards: ShardSet, samples: Iterable[dict[str, Any]]
) -> Iterator[dict[str, Any]]:
    """Decode the samples that have a row, and leave the others out."""
    for sample in samples:
        row = rows.get(sample["__key__"])
        if row is None:
            continue
        decoded: dict[str, Any] = {"__key__": sample["__key__"], "__url__": sample["__url__"], **row}
        for name, info in shards.signals.items():
            stored = np.load(io.BytesIO(sample[f"{name}.npy"]), allow_pickle=False)
            decoded[name] = stored.astype(np.float32) * np.float32(info.uv_per_bit)
        # Shards of others may do without JSON.
        decoded["json"] = json.loads(sample.get("json", b"{}"))
        decoded["labels"] = decoded["json"].get("labels", {})
        yield decoded
