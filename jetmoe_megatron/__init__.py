"""Pretraining of JetMoE on Megatron-Core. Start reading at `pretrain_jetmoe.py`."""

import logging
import warnings

__version__ = "0.1.0"

# Each module of Megatron-Core warns that Transformer Engine and Apex are missing, above the line that matters.
warnings.filterwarnings("ignore", module=r"megatron\.core\..*")
# torch says so on a machine with the CUDA toolkit but no GPU, as soon as Megatron-Core is imported.
logging.getLogger("torch.utils.cpp_extension").addFilter(
    lambda record: not record.getMessage().startswith("No CUDA runtime is found")
)
