"""``physio-dist VERB``: parses and dispatches."""

from __future__ import annotations

import argparse
import csv
import io
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from physio_dist import __version__, config, storage
from physio_dist.config.loader import Parser
from physio_dist.errors import DataError, UserError, nearest
from physio_dist.runs import job_paths
from physio_dist.runtime import exit_status
from physio_dist.signals import readers
from physio_dist.signals.recording import Recording

if TYPE_CHECKING:
    from physio_dist.evaluation.reconstruction import PretrainedRun


def _parser() -> argparse.ArgumentParser:
    parser = Parser(
        prog="physio-dist", description="Pretraining for physiological signals, from recordings to encoders."
    )
    parser.add_argument("--version", action="version", version=f"physio-dist {__version__}")
    verbs = parser.add_subparsers(dest="verb", required=True, metavar="VERB")

    shard = verbs.add_parser("shard", help="raw recordings -> shards and their index")
    shard.add_argument("reader", metavar="READER", help=", ".join(readers.names()))
    shard.add_argument("input", metavar="INPUT", help="a folder; for simulate people=N,windows=N,seed=N,trials=N")
    shard.add_argument("--out", required=True, metavar="URL", help="folder of the shards, local or s3://")
    shard.add_argument("options", nargs="*", metavar="key=value", help="see docs/guides/data.md")

    index = verbs.add_parser("index", help="an index for a WebDataset that somebody else wrote")
    index.add_argument("url", metavar="URL")
    index.add_argument("options", nargs="*", metavar="key=value", help="channels=I,II,...; see docs/guides/data.md")

    verify = verbs.add_parser("verify", help="check every shard against the index")
    verify.add_argument("url", metavar="URL")

    describe = verbs.add_parser("inspect", help="what a shard set holds")
    describe.add_argument("url", metavar="URL")
    describe.add_argument("--plot", nargs=2, metavar=("N", "OUT.png"), help="draw N windows")

    export = verbs.add_parser("export", help="newest checkpoint of a run -> encoder folder")
    export.add_argument("run", metavar="RUN", help="run.dir/run.name")
    export.add_argument("out", metavar="OUT", help="folder for encoder.safetensors, config.json and the model card")
    export.add_argument("--raw", action="store_true", help="the weights themselves, not their moving average")

    embed = verbs.add_parser("embed", help="frozen features of every window of a shard set")
    embed.add_argument("--encoder", required=True, metavar="DIR", help="an export, or a CBraMod checkpoint; or cbramod")
    embed.add_argument("--data", required=True, metavar="URL", help="a shard set")
    embed.add_argument("--out", required=True, metavar="URL", help="folder of the features, local or s3://")
    embed.add_argument("--signal", choices=("ecg", "eeg"), help="refuse an encoder of the other signal")
    embed.add_argument("options", nargs="*", metavar="key=value", help="data.cache_dir, data.cache_gb")

    folds = verbs.add_parser("folds", help="a resplit of a sweep's shard set for each fold, to pretrain on")
    folds.add_argument("--config", required=True, metavar="FILE", help="the sweep's configuration")
    folds.add_argument("--out", required=True, metavar="URL", help="folder of the resplits, local or s3://")
    folds.add_argument("options", nargs="*", metavar="key=value", help="override the configuration; split.val=0.1")

    predict = verbs.add_parser("predict", help="a sweep's classifier on a raw recording: one row a window")
    predict.add_argument("model", metavar="MODEL", help="a sweep's folder, or the classifier/ in it")
    predict.add_argument("file", metavar="FILE", help="an EDF file or a WFDB record")
    predict.add_argument("--fold", metavar="K", help="the heads that fold K was tested with; else those of everybody")
    predict.add_argument(
        "--rest", metavar="REST", help="what tune.baseline=subtract subtracts: a file, or START:END of FILE in seconds"
    )
    predict.add_argument("--out", metavar="FILE.csv", help="where the rows go, a path or URL; else they are printed")

    probe = verbs.add_parser("probe", help="linear probe of a frozen encoder, with its baselines")
    probe.add_argument("--config", required=True, metavar="FILE", help="the ones that ship are in configs/probe/")
    probe.add_argument("options", nargs="*", metavar="key=value", help="options that go over the file's")

    plan = verbs.add_parser("plan", help="what a pretraining run would need before anybody pays for it")
    plan.add_argument("--config", required=True, metavar="FILE", help="the run's configuration")
    plan.add_argument("--nodes", required=True, type=int, metavar="N")
    plan.add_argument("--gpus-per-node", required=True, type=int, metavar="M")
    plan.add_argument("--samples-per-s", type=float, metavar="S", help="speed of all GPUs together, if measured")
    plan.add_argument("--gpu", default="H100", metavar="NAME", help="whose peak the speed is worked out from (H100)")
    plan.add_argument("--gpu-memory-gb", type=float, default=80.0, metavar="GB", help="memory of each (80)")
    plan.add_argument("--json", action="store_true", help="one JSON object instead of lines")
    plan.add_argument("options", nargs="*", metavar="key=value", help="override the configuration")

    report = verbs.add_parser("report", help="report.html of a pretraining run or a sweep, self-contained")
    report.add_argument(
        "runs", metavar="RUN", nargs="+", help="run.dir/run.name; others are shown below the first, on its page"
    )
    return parser


def _shard(given: argparse.Namespace) -> None:
    from physio_dist.data.convert import converter

    options = config.load(config.ShardConfig, None, given.options)
    out = job_paths.require_durable(given.out, "--out")
    if not options.ray:
        converter.report_summary(converter.convert(given.reader, given.input, out, options), print)
        return
    # Ray takes seconds to import.
    from physio_dist.ray_backend import task_pool

    out = storage.absolute(out)
    source = given.input if readers.reader(given.reader).simulated else job_paths.resolve_durable(given.input, "INPUT")
    with task_pool.on_cluster(options.ray, options.workers, options.placement_timeout_s) as pool:
        converter.report_summary(converter.convert(given.reader, source, out, options, pool), print)


def _index(given: argparse.Namespace) -> None:
    from physio_dist.data.index_existing import IndexOptions, index_existing

    options = config.load(IndexOptions, None, given.options)
    made = index_existing(given.url, options)
    print(f"{made.nsamples} samples of {made.people} people in {len(made.shards)} shards")
    print(storage.join(made.url, "index.json"))


def _verify(given: argparse.Namespace) -> None:
    from physio_dist.data import verify
    from physio_dist.data.format.index import open_set

    faults = 0
    for fault in verify.verify(given.url):
        print(fault, flush=True)
        faults += 1
    if faults:
        raise DataError(f"{given.url}: {faults} fault(s)")
    shards = open_set(given.url)
    print(f"{given.url}: {shards.nsamples} samples in {len(shards.shards)} shards, all as the index says")


def _inspect(given: argparse.Namespace) -> None:
    from physio_dist.data import describe

    print("\n".join(describe.describe(given.url)))
    if given.plot is None:
        return
    count, out = given.plot
    if not count.isdecimal():
        raise UserError(f"--plot {count}: the first word is how many windows to draw")
    from physio_dist.report.pretraining_plots import draw_windows

    shards, drawn = describe.some_windows(given.url, int(count))
    for name, windows in drawn.items():
        target = out if len(drawn) == 1 else f"{out.removesuffix('.png')}-{name}.png"
        note = ", SIMULATED" if shards.simulated else ""
        headline = f"{name.upper()} windows of {shards.url.rsplit('/', 1)[-1]}{note}"
        channels = shards.signals[name].channels
        picture = draw_windows(windows.signal, windows.valid, channels, shards.rate, windows.keys, headline)
        storage.write_bytes(target, picture)
        print(target)


def _export(given: argparse.Namespace) -> None:
    from physio_dist.training import export

    out = job_paths.require_durable(given.out, "OUT")
    found = export.export(given.run, out, lambda text: print(f"warning: {text}", file=sys.stderr), given.raw)
    print(f"step {found.progress.step} of {given.run} -> {given.out}")


def _embed(given: argparse.Namespace) -> None:
    from physio_dist.data.handle import open_handle
    from physio_dist.evaluation import backbones, features

    out = job_paths.require_durable(given.out, "--out")
    backbone = backbones.open_backbone(given.encoder, given.signal)
    if backbone.loaded:
        print(backbone.loaded, file=sys.stderr)
    options = config.load(config.EmbedConfig, None, given.options)
    features.embed(backbone, open_handle(given.data, options.data), out, print)


def _folds(given: argparse.Namespace) -> None:
    from physio_dist.data.handle import open_handle
    from physio_dist.evaluation import fold_resplits

    options = config.load(fold_resplits.FoldsConfig, given.config, given.options)
    out = job_paths.require_durable(given.out, "--out")
    resplits, written = fold_resplits.write_fold_resplits(options, open_handle(options.tune.data, options.data), out)
    there = len(resplits) - written
    print(f"resplits of {resplits[0].data_url}" + (f", {there} of {len(resplits)} were there already" if there else ""))
    for resplit in resplits:
        print(f"{resplit.url}: windows: " + ", ".join(f"{count} {name}" for name, count in resplit.splits.items()))
    if options.split.val and not all(resplit.splits["val"] for resplit in resplits):
        print("  split.val takes people by a hash, and met nobody in some: a larger share may")


def _predict(given: argparse.Namespace) -> None:
    recording = readers.read_file(given.file)
    rest = None if given.rest is None else _rest(given.rest)
    # A file that will not do is told at once; torch takes seconds to import.
    from physio_dist.evaluation.serving.classifier import FusionClassifier

    model = FusionClassifier.load(given.model, given.fold)
    try:
        found = model.predict_recording(recording, rest)
    except UserError as error:
        raise UserError(f"{given.file}: {error}") from None
    for note in found.notes:
        print(f"{given.file}: {note}", file=sys.stderr)
    rows = found.rows()
    text = io.StringIO()
    table = csv.DictWriter(text, list(rows[0]), lineterminator="\n")
    table.writeheader()
    table.writerows(rows)
    if given.out is None:
        print(text.getvalue(), end="")
    else:
        storage.write_bytes(given.out, text.getvalue().encode())
        print(given.out)


def _rest(given: str) -> Recording | tuple[float, float]:
    """``--rest``: a recording, or seconds of the one that is classified."""
    start, colon, end = given.partition(":")
    try:
        return float(start), float(end)
    except ValueError:
        if colon and not Path(given).exists():
            raise UserError(f"--rest {given}: neither a file nor START:END in seconds") from None
        return readers.read_file(given)


def _probe(given: argparse.Namespace) -> None:
    from physio_dist.config import ProbeConfig
    from physio_dist.evaluation import probe, reconstruction

    def say(text: str) -> None:
        print(text, file=sys.stderr, flush=True)

    options = config.load(ProbeConfig, given.config, given.options)
    job_paths.require_durable(options.run.dir, "run.dir")
    if options.probe.task == "labels":
        lines = probe.table_of(probe.probe(options, say))
    else:
        lines = reconstruction.table_of(reconstruction.reconstruction(options, _trained, say))
    print("\n".join(lines))
    print(storage.join(options.run.dir, options.run.name, "results.json"))


def _trained(run: str) -> PretrainedRun:
    """The newest checkpoint of a run: its reconstruction head is in no export."""
    from physio_dist.evaluation.backbones import people_of
    from physio_dist.evaluation.reconstruction import PretrainedRun
    from physio_dist.training import checkpoint

    found = checkpoint.newest(run, lambda text: print(f"warning: {text}", file=sys.stderr))
    if found is None:
        raise UserError(f"{run} has no committed checkpoint; give the folder run.dir/run.name of a run, not an export")
    about = found.progress
    return PretrainedRun(run, about.step, about.encoder, about.signal, found.model, people_of(run))


def _plan(given: argparse.Namespace) -> None:
    from physio_dist.planning import resource_planner

    options = config.load(config.PretrainConfig, given.config, given.options)
    speed = given.samples_per_s
    if (speed is not None and not 0 < speed < float("inf")) or not given.gpu_memory_gb > 0:
        raise UserError("--samples-per-s and --gpu-memory-gb must be positive numbers")
    cluster = resource_planner.Cluster(given.nodes, given.gpus_per_node, given.gpu, given.gpu_memory_gb, speed)
    told = resource_planner.plan(options, cluster)
    print(json.dumps(told) if given.json else "\n".join(resource_planner.format_plan(told)))


def _report(given: argparse.Namespace) -> None:
    from physio_dist.report.page import render

    def reader(run: str) -> Callable[[str], bytes | None]:
        def read(name: str) -> bytes | None:
            try:
                return storage.read_bytes(storage.join(run, name))
            except storage.NotFoundError:
                return None

        return read

    try:
        page = render(*(reader(run) for run in given.runs))
    except (UserError, DataError) as error:
        kind = DataError if isinstance(error, DataError) else UserError
        raise kind(f"{', '.join(given.runs)}: {error}") from None
    target = storage.join(given.runs[0], "report.html")
    storage.write_bytes(target, page.encode())
    print(target)


_VERBS = {
    "shard": _shard, "index": _index, "verify": _verify, "inspect": _inspect, "export": _export, "embed": _embed,
    "folds": _folds, "predict": _predict, "probe": _probe, "plan": _plan, "report": _report,
}  # fmt: skip


def _given(words: list[str]) -> argparse.Namespace:
    """The parsed command line.

    Raises:
        UserError: it is no command of ours.
    """
    parser = _parser()
    verb = next((word for word in words if not word.startswith("-")), None)
    if verb is not None and verb not in _VERBS:
        raise UserError(f"there is no verb {verb!r}: {nearest(verb, _VERBS)}")
    known = {"--help", "--version", *_OPTIONS.get(verb or "", ())}
    for option in (word.split("=")[0] for word in words if word.startswith("--")):
        if option not in known:
            raise UserError(f"there is no option {option!r} here: {nearest(option, known)}")
    given, rest = parser.parse_known_args(words)
    # argparse takes no second run of positional words after an option, and `--out URL key=value` is natural to write.
    more = [word for word in rest if not word.startswith("-") and "=" in word]
    if rest and (more != rest or not hasattr(given, "options")):
        parser.error(f"physio-dist {given.verb} does not take {' '.join(rest)!r}")
    if more:
        given.options = [*given.options, *more]
    return given


_OPTIONS = {
    "shard": ("--out",), "inspect": ("--plot",), "export": ("--raw",), "probe": ("--config",),
    "folds": ("--config", "--out"), "predict": ("--fold", "--rest", "--out"),
    "embed": ("--encoder", "--data", "--out", "--signal"),
    "plan": ("--config", "--nodes", "--gpus-per-node", "--samples-per-s", "--gpu", "--gpu-memory-gb", "--json"),
}  # fmt: skip


def main() -> None:
    """The console script."""
    exit_status.interrupt_on_sigterm()
    sys.exit(exit_status.status_of(lambda: _run(sys.argv[1:])))


def _run(words: list[str]) -> None:
    given = _given(words)
    _VERBS[given.verb](given)


if __name__ == "__main__":
    main()
