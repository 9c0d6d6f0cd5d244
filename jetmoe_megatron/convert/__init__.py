"""Conversion between Megatron checkpoints and Hugging Face folders."""
