"""Phases' mixtures as Megatron datasets. How far a run has read is a `mixture.Position`: a number of samples of the
mixture, and of sequences of each data set."""
