"""One script per published claim: `python -m experiments.NAME`, from the root of the repository."""
