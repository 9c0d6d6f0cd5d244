"""Pretraining of JetMoE on Megatron-Core. Start reading at `pretrain_jetmoe.py`."""
