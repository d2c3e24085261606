"""Command line ``physio-dist VERB``: a table of verbs, and one function for each."""

from __future__ import annotations

import argparse
import csv
import io
import json
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from physio_dist import __version__, storage
from physio_dist.config import EmbedConfig, FoldsConfig, IndexOptions, PretrainConfig, ProbeConfig, ShardConfig
from physio_dist.config.loader import Options, Parser, load
from physio_dist.errors import DataError, UserError, nearest
from physio_dist.runs import job_paths
from physio_dist.runtime import exit_status
from physio_dist.signals import readers
from physio_dist.signals.recording import Recording

if TYPE_CHECKING:
    from physio_dist.evaluation.reconstruction import PretrainedRun


@dataclass(frozen=True)
class _Verb:
    """One command: what it does, its arguments, and the options that it takes as ``key=value``."""

    run: Callable[[argparse.Namespace], None]
    help: str
    arguments: tuple[tuple[str, dict[str, Any]], ...] = ()
    schema: type[Options] | None = None


def _argument(name: str, **settings: Any) -> tuple[str, dict[str, Any]]:
    return name, settings


def _verbs() -> dict[str, _Verb]:
    return {
        "shard": _Verb(
            _shard, "raw recordings -> shards and their index",
            (
                _argument("reader", metavar="READER", help=", ".join(readers.names())),
                _argument("input", metavar="INPUT", help="a folder; for simulate people=N,windows=N,seed=N,trials=N"),
                _argument("--out", required=True, metavar="URL", help="folder of the shards, local or s3://"),
            ),
            ShardConfig,
        ),
        "index": _Verb(
            _index, "an index for a WebDataset that somebody else wrote", (_argument("url", metavar="URL"),),
            IndexOptions,
        ),
        "verify": _Verb(_verify, "check every shard against the index", (_argument("url", metavar="URL"),)),
        "inspect": _Verb(
            _inspect, "what a shard set holds",
            (
                _argument("url", metavar="URL"),
                _argument("--plot", nargs=2, metavar=("N", "OUT.png"), help="draw N windows"),
            ),
        ),
        "export": _Verb(
            _export, "newest checkpoint of a run -> encoder folder",
            (
                _argument("run", metavar="RUN", help="run.dir/run.name"),
                _argument("out", metavar="OUT", help="folder for encoder.safetensors, config.json and the model card"),
                _argument("--raw", action="store_true", help="the weights themselves, not their moving average"),
            ),
        ),
        "embed": _Verb(
            _embed, "frozen features of every window of a shard set",
            (
                _argument(
                    "--encoder", required=True, metavar="DIR", help="an export, or a CBraMod checkpoint; or cbramod"
                ),
                _argument("--data", required=True, metavar="URL", help="a shard set"),
                _argument("--out", required=True, metavar="URL", help="folder of the features, local or s3://"),
                _argument("--signal", choices=("ecg", "eeg"), help="refuse an encoder of the other signal"),
            ),
            EmbedConfig,
        ),
        "folds": _Verb(
            _folds, "a resplit of a sweep's shard set for each fold, to pretrain on",
            (
                _argument("--config", required=True, metavar="FILE", help="the sweep's configuration"),
                _argument("--out", required=True, metavar="URL", help="folder of the resplits, local or s3://"),
            ),
            FoldsConfig,
        ),
        "predict": _Verb(
            _predict, "a sweep's classifier on a raw recording: one row a window",
            (
                _argument("model", metavar="MODEL", help="a sweep's folder, or the classifier/ in it"),
                _argument("file", metavar="FILE", help="an EDF file or a WFDB record"),
                _argument(
                    "--fold", metavar="K", help="the heads that fold K was tested with; else those of everybody"
                ),
                _argument(
                    "--rest", metavar="REST",
                    help="what tune.baseline=subtract subtracts: a file, or START:END of FILE in seconds",
                ),
                _argument("--out", metavar="FILE.csv", help="where the rows go, a path or URL; else they are printed"),
            ),
        ),
        "probe": _Verb(
            _probe, "linear probe of a frozen encoder, with its baselines",
            (_argument("--config", required=True, metavar="FILE", help="the ones that ship are in configs/probe/"),),
            ProbeConfig,
        ),
        "plan": _Verb(
            _plan, "what a pretraining run would need before anybody pays for it",
            (
                _argument("--config", required=True, metavar="FILE", help="the run's configuration"),
                _argument("--nodes", required=True, type=int, metavar="N", help="machines"),
                _argument("--gpus-per-node", required=True, type=int, metavar="M", help="GPUs of each"),
                _argument("--samples-per-s", type=float, metavar="S", help="speed of all GPUs together, if measured"),
                _argument("--gpu", default="H100", metavar="NAME", help="kind of GPU, for its peak speed (H100)"),
                _argument("--gpu-memory-gb", type=float, default=80.0, metavar="GB", help="memory of each (80)"),
                _argument("--json", action="store_true", help="one JSON object instead of lines"),
            ),
            PretrainConfig,
        ),
        "report": _Verb(
            _report, "report.html of a pretraining run or a sweep, self-contained",
            (
                _argument(
                    "runs", metavar="RUN", nargs="+",
                    help="run.dir/run.name; others are shown below the first, on its page",
                ),
            ),
        ),
    }  # fmt: skip


def _parser(verbs: Mapping[str, _Verb]) -> argparse.ArgumentParser:
    parser = Parser(
        prog="physio-dist", description="Pretraining for physiological signals, from recordings to encoders."
    )
    parser.add_argument("--version", action="version", version=f"physio-dist {__version__}")
    choices = parser.add_subparsers(dest="verb", required=True, metavar="VERB", parser_class=Parser)
    for name, verb in verbs.items():
        command = choices.add_parser(name, help=verb.help, description=verb.help, schema=verb.schema)
        for argument, settings in verb.arguments:
            command.add_argument(argument, **settings)
        if verb.schema is not None:
            command.add_argument("options", nargs="*", metavar="key=value", help="listed below")
    return parser


def _shard(args: argparse.Namespace) -> None:
    from physio_dist.data.convert import converter

    options: ShardConfig = args.options
    out = job_paths.require_durable(args.out, "--out")
    if not options.ray:
        converter.report_summary(converter.convert(args.reader, args.input, out, options), print)
        return
    # Ray takes seconds to import.
    from physio_dist.ray_backend import task_pool

    out = storage.absolute(out)
    source = args.input if readers.reader(args.reader).simulated else job_paths.resolve_durable(args.input, "INPUT")
    with task_pool.on_cluster(options.ray, options.workers, options.placement_timeout_s) as pool:
        converter.report_summary(converter.convert(args.reader, source, out, options, pool), print)


def _index(args: argparse.Namespace) -> None:
    from physio_dist.data.index_existing import index_existing

    made = index_existing(args.url, args.options)
    print(f"{made.nsamples} samples of {made.people} people in {len(made.shards)} shards")
    print(storage.join(made.url, "index.json"))


def _verify(args: argparse.Namespace) -> None:
    from physio_dist.data import verify
    from physio_dist.data.format.index import open_set

    faults = 0
    for fault in verify.verify(args.url):
        print(fault, flush=True)
        faults += 1
    if faults:
        raise DataError(f"{args.url}: {faults} fault(s)")
    shards = open_set(args.url)
    print(f"{args.url}: {shards.nsamples} samples in {len(shards.shards)} shards, all as the index says")


def _inspect(args: argparse.Namespace) -> None:
    from physio_dist.data import describe

    print("\n".join(describe.describe(args.url)))
    if args.plot is None:
        return
    count, out = args.plot
    if not count.isdecimal():
        raise UserError(f"--plot {count}: the first word is how many windows to draw")
    from physio_dist.report.pretraining_plots import draw_windows

    shards, drawn = describe.some_windows(args.url, int(count))
    for name, windows in drawn.items():
        target = out if len(drawn) == 1 else f"{out.removesuffix('.png')}-{name}.png"
        note = ", SIMULATED" if shards.simulated else ""
        headline = f"{name.upper()} windows of {shards.url.rsplit('/', 1)[-1]}{note}"
        channels = shards.signals[name].channels
        picture = draw_windows(windows.signal, windows.valid, channels, shards.rate, windows.keys, headline)
        storage.write_bytes(target, picture)
        print(target)


def _export(args: argparse.Namespace) -> None:
    from physio_dist.training import export

    out = job_paths.require_durable(args.out, "OUT")
    found = export.export(args.run, out, lambda text: print(f"warning: {text}", file=sys.stderr), args.raw)
    print(f"step {found.progress.step} of {args.run} -> {args.out}")


def _embed(args: argparse.Namespace) -> None:
    from physio_dist.data.handle import open_handle
    from physio_dist.evaluation import backbones, features

    out = job_paths.require_durable(args.out, "--out")
    backbone = backbones.open_backbone(args.encoder, args.signal)
    if backbone.loaded:
        print(backbone.loaded, file=sys.stderr)
    options: EmbedConfig = args.options
    features.embed(backbone, open_handle(args.data, options.data), out, print)


def _folds(args: argparse.Namespace) -> None:
    from physio_dist.data.handle import open_handle
    from physio_dist.evaluation import fold_resplits

    options: FoldsConfig = args.options
    out = job_paths.require_durable(args.out, "--out")
    resplits, written = fold_resplits.write_fold_resplits(options, open_handle(options.tune.data, options.data), out)
    there = len(resplits) - written
    print(f"resplits of {resplits[0].data_url}" + (f", {there} of {len(resplits)} were there already" if there else ""))
    for resplit in resplits:
        print(f"{resplit.url}: windows: " + ", ".join(f"{count} {name}" for name, count in resplit.splits.items()))
    if options.split.val and not all(resplit.splits["val"] for resplit in resplits):
        print("  split.val takes people by a hash, and met nobody in some: a larger share may")


def _predict(args: argparse.Namespace) -> None:
    recording = readers.read_file(args.file)
    rest = None if args.rest is None else _rest(args.rest)
    # A file that will not do is told at once; torch takes seconds to import.
    from physio_dist.evaluation.serving.classifier import FusionClassifier

    model = FusionClassifier.load(args.model, args.fold)
    try:
        found = model.predict_recording(recording, rest)
    except UserError as error:
        raise UserError(f"{args.file}: {error}") from None
    for note in found.notes:
        print(f"{args.file}: {note}", file=sys.stderr)
    rows = found.rows()
    text = io.StringIO()
    table = csv.DictWriter(text, list(rows[0]), lineterminator="\n")
    table.writeheader()
    table.writerows(rows)
    if args.out is None:
        print(text.getvalue(), end="")
    else:
        storage.write_bytes(args.out, text.getvalue().encode())
        print(args.out)


def _rest(given: str) -> Recording | tuple[float, float]:
    """``--rest``: a recording, or seconds of the one that is classified."""
    start, colon, end = given.partition(":")
    try:
        return float(start), float(end)
    except ValueError:
        if colon and not Path(given).exists():
            raise UserError(f"--rest {given}: neither a file nor START:END in seconds") from None
        return readers.read_file(given)


def _probe(args: argparse.Namespace) -> None:
    from physio_dist.evaluation import probe, reconstruction

    def say(text: str) -> None:
        print(text, file=sys.stderr, flush=True)

    options: ProbeConfig = args.options
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


def _plan(args: argparse.Namespace) -> None:
    from physio_dist.planning import resource_planner

    options: PretrainConfig = args.options
    speed = args.samples_per_s
    if (speed is not None and not 0 < speed < float("inf")) or not args.gpu_memory_gb > 0:
        raise UserError("--samples-per-s and --gpu-memory-gb must be positive numbers")
    cluster = resource_planner.Cluster(args.nodes, args.gpus_per_node, args.gpu, args.gpu_memory_gb, speed)
    told = resource_planner.plan(options, cluster)
    print(json.dumps(told) if args.json else "\n".join(resource_planner.format_plan(told)))


def _report(args: argparse.Namespace) -> None:
    from physio_dist.report.page import render

    def reader(run: str) -> Callable[[str], bytes | None]:
        def read(name: str) -> bytes | None:
            try:
                return storage.read_bytes(storage.join(run, name))
            except storage.NotFoundError:
                return None

        return read

    try:
        page = render(*(reader(run) for run in args.runs))
    except (UserError, DataError) as error:
        kind = DataError if isinstance(error, DataError) else UserError
        raise kind(f"{', '.join(args.runs)}: {error}") from None
    target = storage.join(args.runs[0], "report.html")
    storage.write_bytes(target, page.encode())
    print(target)


def _parse(words: list[str], verbs: Mapping[str, _Verb]) -> argparse.Namespace:
    """The parsed command line, its ``key=value`` words loaded into the verb's schema.

    Raises:
        UserError: an unknown verb, argument or option.
    """
    parser = _parser(verbs)
    name = next((word for word in words if not word.startswith("-")), None)
    if name is not None and name not in verbs:
        raise UserError(f"there is no verb {name!r}: {nearest(name, verbs)}")
    verb = verbs[name] if name else None
    flags = {"--help", "--version"} | {
        argument for argument, _ in (verb.arguments if verb else ()) if argument[0] == "-"
    }
    for flag in (word.split("=")[0] for word in words if word.startswith("--")):
        if flag not in flags:
            raise UserError(f"there is no option {flag!r} here: {nearest(flag, flags)}")
    args, rest = parser.parse_known_args(words)
    # argparse takes no second run of positional words after an option, and `--out URL key=value` is natural to write.
    more = [word for word in rest if not word.startswith("-") and "=" in word]
    if rest and (more != rest or verb is None or verb.schema is None):
        parser.error(f"physio-dist {args.verb} does not take {' '.join(rest)!r}")
    if verb is not None and verb.schema is not None:
        args.options = load(verb.schema, getattr(args, "config", None), [*args.options, *more])
    return args


def main() -> None:
    """Run the console script."""
    exit_status.interrupt_on_sigterm()
    sys.exit(exit_status.status_of(lambda: _run(sys.argv[1:])))


def _run(words: list[str]) -> None:
    verbs = _verbs()
    args = _parse(words, verbs)
    verbs[args.verb].run(args)


if __name__ == "__main__":
    main()
