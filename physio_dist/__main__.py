"""``python -m physio_dist VERB``: the same as ``physio-dist VERB``."""

from physio_dist.cli import main

if __name__ == "__main__":
    main()
