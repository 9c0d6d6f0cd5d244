"""Starting the training on one machine or on SLURM: `elastic` is torchrun with an exit status that can be trusted."""
