"""Pretraining of JetMoE on Megatron-Core. Start reading at `pretrain_jetmoe.py`."""

import warnings

# Megatron-Core says of each of its modules that Transformer Engine and Apex are not there: before the line that counts.
warnings.filterwarnings("ignore", module=r"megatron\.core\..*")
# torch says it of files that it then refuses (torch/_weights_only_unpickler.py:590).
warnings.filterwarnings("ignore", message="Detected pickle protocol")
