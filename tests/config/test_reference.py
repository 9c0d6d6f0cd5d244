"""The tables of docs/configuration.md are generated from the schema, and explain every key."""

from __future__ import annotations

import re
import sys

import pytest

from jetmoe_megatron.config.expert_backends import EXPERT_BACKENDS
from jetmoe_megatron.config.json_schema import plain_schema
from jetmoe_megatron.config.learning_rate_shapes import LEARNING_RATES
from jetmoe_megatron.config.reference import reference
from jetmoe_megatron.config.schema import Run
from tests.support import REPO, command, jetmoe

PAGE = REPO / "docs/configuration.md"
TOP = plain_schema(Run)
SECTIONS = {"Run": TOP, **TOP["definitions"]}
ROWS = {row.split(" | ")[0].strip("| `"): row for row in reference().splitlines() if row.startswith("| `")}


@pytest.mark.parametrize("name", SECTIONS)
def test_every_section_and_key_has_a_description(name: str) -> None:
    assert re.fullmatch(r"[A-Z].*\.", SECTIONS[name]["description"])
    for key, spec in SECTIONS[name]["properties"].items():
        if "#/definitions/" not in str(spec):  # a section has its own
            assert re.fullmatch(r"[A-Z`].*\.", spec["description"]), key


def test_every_section_has_a_table_and_every_key_a_row() -> None:
    assert len(SECTIONS) == reference().count("\n| key | ") == 18
    keys = [key for section in SECTIONS.values() for key in section["properties"]]
    rows = [line for line in reference().splitlines() if line.startswith("| `")]
    assert len(rows) == len(keys) > 80
    assert all(len(re.findall(r"(?<!\\)\|", row)) == 5 for row in rows)


@pytest.mark.parametrize(
    ("key", "type_", "default"),
    [
        ("output_dir", "text, not empty", "required"),
        ("seed", "whole number from 0", "`1234`"),
        ("num_layers", "whole number from 1, at most 10000", "required"),
        ("max_lr", "number above 0", "`0.0005`"),
        ("eps", "number above 0", "`1e-08`"),
        ("final_lr_ratio", "number above 0, at most 1", "`0.1`"),
        ("betas", "list of 2: number from 0, below 1", "`[0.9, 0.95]`"),
        ("sequence", "true or false, or `auto`", "`auto`"),
        ("asynchronous", "true or false", "`true`"),
        ("cache", "null, or text", "`null`"),
        ("layers_per_stage", "null, or list: whole number from 1", "`null`"),
        ("may_change", "list: text", "`[]`"),
        ("wandb", "`off`, `offline` or `online`, or true or false", "`off`"),
        (
            "expert_backend",
            ", ".join(f"`{name}`" for name in ["auto", *EXPERT_BACKENDS][:-1]) + " or `te_fp8`",
            "`auto`",
        ),
        ("learning_rate", " or ".join(f"`{name}`" for name in LEARNING_RATES), "required"),
        ("losses", "[section](#losses)", "its defaults"),
        ("model", "[section](#model), or file name", "required"),
        ("phases", "list of 1 or more: [section](#each-entry-of-phases), or file name", "required"),
    ],
)
def test_types_and_defaults_are_words(key: str, type_: str, default: str) -> None:
    assert ROWS[key].startswith(f"| `{key}` | {type_} | {default} | ")


def test_the_page_has_the_tables() -> None:
    made = re.search(r"<!-- made by: jetmoe config reference -->\n(.*)<!-- end -->\n", PAGE.read_text(), re.DOTALL)
    assert made and made[1] == reference(), "put what `jetmoe config reference` prints between the markers"


def test_the_command_prints_them() -> None:
    result = jetmoe("config", "reference")
    assert (result.returncode, result.stdout, result.stderr) == (0, reference(), "")


@pytest.mark.parametrize("arguments", [["reference"], ["schema"], ["show", "configs/my_run.yaml"]])
def test_the_commands_need_neither_torch_nor_megatron(arguments: list[str]) -> None:
    without = "import sys; sys.modules.update(dict.fromkeys(['torch', 'megatron', 'transformers', 'numpy']));"
    code = f"{without} from jetmoe_megatron.cli import main; sys.exit(main({['config', *arguments]}))"
    result = command(sys.executable, "-c", code)
    assert (result.returncode, result.stderr) == (0, "")
