"""The fusion sweep: ``python -m physio_dist.tune --config FILE [key=value ...]``, also under ``ray job submit``."""

import sys

from physio_dist.ray_backend.tune_driver import main
from physio_dist.runtime.exit_status import status_of

if __name__ == "__main__":
    sys.exit(status_of(main))
