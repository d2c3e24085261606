"""Pretraining on a Ray cluster: ``python -m physio_dist.launch --config FILE [key=value ...]``."""

from physio_dist.runtime.exit_status import end_rank, status_of


def main() -> None:
    """Run the driver; Ray is imported here, so that a missing extra ends in one message."""
    from physio_dist.ray_backend import train_driver

    train_driver.main()


if __name__ == "__main__":
    end_rank(status_of(main))
