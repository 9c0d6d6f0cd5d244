"""Pretraining of JetMoE on Megatron-Core. Start reading at `pretrain_jetmoe.py`."""

import warnings

__version__ = "0.1.0"

# Each module of Megatron-Core warns that Transformer Engine and Apex are missing, above the line that matters.
warnings.filterwarnings("ignore", module=r"megatron\.core\..*")
