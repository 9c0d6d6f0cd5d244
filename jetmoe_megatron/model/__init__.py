"""JetMoE as Megatron-Core specs. Read `spec.py` first, then `attention.py`, `mlp.py`, `router.py`."""
