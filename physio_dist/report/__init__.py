"""The HTML page of a run: read from its directory, written as one file that needs nothing else."""
