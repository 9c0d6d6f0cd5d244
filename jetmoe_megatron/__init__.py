"""Pretraining of JetMoE on Megatron-Core. Start reading at `pretrain_jetmoe.py`."""

import warnings

__version__ = "0.1.0"

# Megatron-Core says of each of its modules that Transformer Engine and Apex are not there: before the line that counts.
warnings.filterwarnings("ignore", module=r"megatron\.core\..*")
