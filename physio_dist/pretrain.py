"""One rank of pretraining: ``deepspeed physio_dist/pretrain.py --config FILE [key=value ...]``.

``torchrun`` and plain ``python`` start it the same way.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

# A launcher puts this file's folder first on the import path, where our modules could hide others of the same name.
_HERE = str(Path(__file__).resolve().parent)
sys.path[:] = [entry for entry in sys.path if str(Path(entry or ".").resolve()) != _HERE]
if (_ROOT := str(Path(_HERE).parent)) not in sys.path:
    sys.path.insert(0, _ROOT)

from physio_dist.config import PretrainConfig  # noqa: E402
from physio_dist.config.loader import Parser, load_command_line  # noqa: E402
from physio_dist.runtime import exit_status  # noqa: E402


def main(arguments: list[str] | None = None) -> None:
    """Read the options, then train as one rank."""
    parser = Parser(PretrainConfig, prog="pretrain.py", description="Pretrain a masked encoder on shards.")
    # The DeepSpeed launcher adds it.
    parser.add_argument("--local_rank", type=int, help=argparse.SUPPRESS)
    options = load_command_line(parser, PretrainConfig, arguments)

    from physio_dist.runtime.distributed import choose_accelerator
    from physio_dist.runtime.preemption import PreemptionHandler

    choose_accelerator()
    stop = PreemptionHandler()
    stop.install()
    from physio_dist.training.pretrain import pretrain

    pretrain(options, stop)


if __name__ == "__main__":
    exit_status.end_rank(exit_status.status_of(main))
