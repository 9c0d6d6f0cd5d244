"""Where a run's numbers go: the terminal, metrics.jsonl, Weights & Biases, TensorBoard."""
