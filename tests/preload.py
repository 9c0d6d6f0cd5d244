"""What every warm process of the tests has imported (`tests/warm.py`). It starts no thread and joins no group."""

from __future__ import annotations

import gc
import importlib
import os
import sys
import warnings

warnings.simplefilter("ignore")  # as PYTHONWARNINGS does where a test starts a process
os.environ["OMP_NUM_THREADS"] = "1"  # torch reads it when it is imported
os.environ["TOKENIZERS_PARALLELISM"] = "false"
os.environ["HF_HUB_OFFLINE"] = "1"

sys.modules["wandb"] = None  # type: ignore[assignment]  # else each import leaves two folders among the temporary ones
for name in (
    "fastokens",
    "megatron.core.models.gpt",
    "megatron.core.pipeline_parallel",
    "orjson",
    "psutil",
    "pyarrow.parquet",
    "sentencepiece",
    "transformers.models.auto.modeling_auto",
    "transformers.models.auto.tokenization_auto",
    "data_tools.__main__",
    "data_tools.inspect",
    "data_tools.merge",
    "data_tools.split",
    "data_tools.tokenize",
    "jetmoe_megatron.cli",
    "jetmoe_megatron.convert.from_hf",
    "jetmoe_megatron.convert.verify",
    "jetmoe_megatron.data.prepare",
    "jetmoe_megatron.doctor.here",
    "jetmoe_megatron.doctor.ranks",
    "jetmoe_megatron.model.experts.choose_backend",
    "jetmoe_megatron.report.write",
    "jetmoe_megatron.training.loop",
    "jetmoe_megatron.training.ranks.process_groups",
    "jetmoe_megatron.training.preflight",
    "pretrain_jetmoe",
    "tests.injected_faults",
    "tests.parallel.oracle",
):
    importlib.import_module(name)
del sys.modules["wandb"]
gc.freeze()  # what is not touched is not copied
