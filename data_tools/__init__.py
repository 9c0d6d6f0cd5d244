"""Tools that turn text into Megatron indexed datasets. They need neither a GPU, nor Megatron, nor the trainer."""
