"""What a run would use on this machine, and why: what `auto` means, and what stands in for what is missing."""

from __future__ import annotations

import math
import os
from collections.abc import Callable

import torch

from jetmoe_megatron.config.layout import Layout, resolve_layout
from jetmoe_megatron.config.schema import Run
from jetmoe_megatron.doctor.packages import why_not_importable
from jetmoe_megatron.doctor.problems import Problem
from jetmoe_megatron.errors import InputError, UserError
from jetmoe_megatron.model.fusion import can_fuse
from jetmoe_megatron.runtime.device import has_gpu
from jetmoe_megatron.runtime.matmul import bf16_is_slow, by_onednn, choose_matmul
from jetmoe_megatron.runtime.promised_gpus import check_device


def in_use(run: Run | None) -> tuple[list[tuple[str, str]], list[Problem]]:
    """(what, which one and why), and what is refused.

    Raises:
        UserError: the run cannot be divided over any number of ranks.
    """
    questions: dict[str, Callable[[], str]] = {"device": lambda: _device(run)}
    if run:
        layout = _some_layout(run)
        questions |= {
            "expert backend": lambda: _expert_backend(run, layout),
            "attention": lambda: _attention(run, layout),
            "exchange of rows": lambda: _exchange(run, layout),
        }
    questions |= {"optimizer": _optimizer, "elementwise operations": _elementwise, "tokenizer": lambda: _tokenizer(run)}
    if not has_gpu():
        questions["matmuls"] = _matmuls
    answers, problems = [], []
    for what, ask in questions.items():
        try:
            answers.append((what, ask()))
        except UserError as error:
            answers.append((what, "refused"))
            problems.append(Problem("wrong", str(error), "", "change what the line says"))
    return answers, problems


def _some_layout(run: Run) -> Layout:
    """Of the ranks that there are or, without a launcher, of the fewest that the run can have."""
    parallel = run.parallel
    fewest = math.lcm(
        parallel.tensor * parallel.pipeline * parallel.context,
        parallel.expert * parallel.expert_tensor * parallel.pipeline,
    )
    return resolve_layout(run, int(os.environ.get("WORLD_SIZE", fewest)))


def _device(run: Run | None) -> str:
    check_device(run.device if run else "auto")
    return torch.cuda.get_device_name() if has_gpu() else "CPU"


def _expert_backend(run: Run, layout: Layout) -> str:
    from jetmoe_megatron.model.experts.choose_backend import choose_backend

    choice = choose_backend(run, layout)
    return f"{choice.name}: {choice.why}"


def _attention(run: Run, layout: Layout) -> str:
    from jetmoe_megatron.model.attention_kernel import attention_kernel

    if layout.context > 1 and (why := why_not_importable("transformer_engine.pytorch")):
        raise UserError(f"parallel.context: needs Transformer Engine, which cannot be imported ({why})")
    return attention_kernel(run, layout)


def _exchange(run: Run, layout: Layout) -> str:
    from jetmoe_megatron.model.exchange_options import check_exchange
    from jetmoe_megatron.model.experts.choose_backend import choose_backend

    check_exchange(run, choose_backend(run, layout).name)
    if run.parallel.expert == 1:
        return "none: all experts are on each rank (parallel.expert: 1)"
    return run.parallel.moe_token_dispatcher


def _optimizer() -> str:
    from megatron.core.optimizer import USING_PYTORCH_OPTIMIZER

    if has_gpu() and not USING_PYTORCH_OPTIMIZER:
        return "FusedAdam of Transformer Engine or Apex"
    return "torch's fused AdamW" + (": neither Transformer Engine nor Apex is there" if has_gpu() else "")


def _elementwise() -> str:
    if not has_gpu():
        return "one by one: there is no GPU"
    return "fused by torch.compile" if can_fuse() else "one by one: torch.compile does not work here"


def _tokenizer(run: Run | None) -> str:
    if run and run.tokenizer:
        try:
            from data_tools.engines import choose_engine  # training itself needs none of its packages

            name, why = choose_engine(run.tokenizer, "auto")
        except (ImportError, InputError) as error:
            return f"not known: {error}"
        return f"{name}: {why}" if why else name
    if why := why_not_importable("fastokens"):
        return f"tokenizers: fastokens cannot be imported ({why})"
    return "fastokens, where it gives the same ids as tokenizers"


def _matmuls() -> str:
    choose_matmul()
    library = "oneDNN, on an AMD CPU with AVX-512" if by_onednn(torch.float32) else "torch's default library"
    bf16 = "by plain loops, far slower than fp32: set precision: fp32" if bf16_is_slow() else "by oneDNN"
    return f"fp32 by {library}; bf16 {bf16}"
