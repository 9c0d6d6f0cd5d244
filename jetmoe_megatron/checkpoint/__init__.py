"""Megatron distributed checkpoints of a run: written aside, then published under their name."""
