"""The training loop (`loop.py`) and the parts it turns."""
