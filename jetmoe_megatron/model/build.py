"""This rank's part of the model."""

from __future__ import annotations

import logging

import torch
from megatron.core import parallel_state
from megatron.core.models.gpt import GPTModel
from megatron.core.transformer.transformer_block import get_num_layers_to_build

from jetmoe_megatron.config.layout import Layout
from jetmoe_megatron.config.schema import Run
from jetmoe_megatron.model.config import transformer_config
from jetmoe_megatron.model.experts.choose_backend import choose_backend
from jetmoe_megatron.model.initial_weights import initialize_weights
from jetmoe_megatron.model.rotary import follow_position_ids
from jetmoe_megatron.model.spec import block_spec
from jetmoe_megatron.runtime.device import device


def build_model(run: Run, layout: Layout, draw_weights: bool = True) -> list[GPTModel]:
    """One GPTModel for each virtual pipeline stage of this rank, on this rank's device.

    Megatron's parallel state must exist.

    draw_weights: draw the initial weights; without it they are undefined, for a checkpoint that fills all of them.
    """
    # Newer versions of Megatron-Core announce HybridModel for each chunk, which has no place for JetMoE's layers.
    logging.getLogger("megatron.core.models.gpt.gpt_model").setLevel(logging.ERROR)
    config = transformer_config(run, layout)
    if run.model.expert_backend == "auto" and torch.distributed.get_rank() == 0:
        choice = choose_backend(run, layout)
        print(f"expert matmuls: {choice.name}, because {choice.why}", flush=True)
    stages: list[int | None] = list(range(layout.virtual_pipeline)) if layout.virtual_pipeline > 1 else [None]
    chunks = []
    for stage in stages:
        chunk = GPTModel(
            config=config,
            transformer_layer_spec=block_spec(get_num_layers_to_build(config, vp_stage=stage)),
            vocab_size=run.model.vocab_size,
            max_sequence_length=run.batch.sequence_length,
            pre_process=parallel_state.is_pipeline_first_stage(ignore_virtual=False, vp_stage=stage),
            post_process=parallel_state.is_pipeline_last_stage(ignore_virtual=False, vp_stage=stage),
            share_embeddings_and_output_weights=True,
            position_embedding_type="rope",
            rotary_base=run.model.rope_theta,
            vp_stage=stage,
        )
        if run.data.reset_positions:
            follow_position_ids(chunk, run.model.rope_theta)
        chunk.to(device())
        if draw_weights:
            initialize_weights(chunk, run.seed, run.model.init_std)
        chunks.append(chunk)
    return chunks
