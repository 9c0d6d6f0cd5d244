"""Phases' mixtures as Megatron datasets. How far a run has read is a `mixture.Position`: how many samples of the mixture,
and how many sequences of each data set."""
