"""Megatron distributed checkpoints of a run: written under another name, then renamed."""
