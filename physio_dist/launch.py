"""Pretraining on a Ray cluster: ``python -m physio_dist.launch --config FILE [key=value ...]``."""

from physio_dist.ray_backend.train_driver import main
from physio_dist.runtime.exit_status import end_rank, status_of

if __name__ == "__main__":
    end_rank(status_of(main))
