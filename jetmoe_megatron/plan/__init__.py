"""Rehearses a training step of one rank of any world in one process, without its GPUs. Read `rehearse.py` first."""
