"""The mixtures of the phases as Megatron datasets. A `mixture.Position` says how far a run has read: the number of
samples of the mixture, and of sequences of each data set."""
