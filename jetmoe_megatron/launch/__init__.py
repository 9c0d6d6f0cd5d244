"""Starts training on one machine or on SLURM: `elastic` is torchrun with a reliable exit status."""
