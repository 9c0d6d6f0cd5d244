"""From a run file's names to Megatron's settings."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from jetmoe_megatron.config import Run
from jetmoe_megatron.config.layout import resolve_layout
from jetmoe_megatron.model.config import transformer_config
from tests.support import small_run


@pytest.mark.parametrize(
    "choice",
    [{"precision": "fp64"}, {"recompute": "half"}, {"losses.scope": "year"}, {"parallel.attention_experts": "x"}],
)
def test_a_name_that_the_schema_alone_knows_is_an_error(choice: dict[str, str], data: dict[str, str]) -> None:
    run: Any = Run.model_validate(small_run(Path("unused"), data, model__expert_backend="loop"))
    layout = resolve_layout(run, 1)
    for key, value in choice.items():
        section, _, name = key.rpartition(".")
        changed = getattr(run, section).model_copy(update={name: value}) if section else value
        run = run.model_copy(update={section or name: changed})
    with pytest.raises(KeyError):
        transformer_config(run, layout)
