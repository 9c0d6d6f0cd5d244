"""The training loop (`loop.py`) and its parts."""
