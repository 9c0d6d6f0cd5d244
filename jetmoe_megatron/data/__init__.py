"""Phases' mixtures as Megatron datasets. A position in the data is a number of consumed samples and nothing else."""
