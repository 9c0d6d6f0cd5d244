"""Tools that turn text into Megatron indexed datasets, without a GPU, Megatron or the trainer."""
