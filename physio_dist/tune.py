"""The fusion sweep: ``python -m physio_dist.tune --config FILE [key=value ...]``, also under ``ray job submit``."""

import sys

from physio_dist.runtime.exit_status import status_of


def main() -> None:
    """Run the driver; Ray is imported here, so that a missing extra ends in one message."""
    from physio_dist.ray_backend import tune_driver

    tune_driver.main()


if __name__ == "__main__":
    sys.exit(status_of(main))
