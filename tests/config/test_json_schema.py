"""The schemas that editors read beside a run file: they accept what training accepts."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import jsonschema
import pytest

from jetmoe_megatron.config.json_schema import SCHEMAS, editor_schema
from jetmoe_megatron.config.yaml_text import parse_yaml
from tests.config.test_load import BAD_VALUES, DATA
from tests.support import REPO, jetmoe, small_run

FILES = {name: REPO / f"configs/{name}.schema.json" for name in SCHEMAS}
YAMLS = sorted((REPO / "configs").rglob("*.yaml"))


def errors(tree: Any, name: str = "run") -> list[str]:
    validator = jsonschema.Draft7Validator(editor_schema(name))
    return [error.json_path for error in validator.iter_errors(tree)]


def as_editors_read(path: Path) -> Any:
    """YAML 1.2, which most editors read, has no off, on, yes and no: they are texts there."""
    return parse_yaml(re.sub(r": (off|on|yes|no)\b", r": '\1'", path.read_text()))


@pytest.mark.parametrize("name", SCHEMAS)
def test_the_file_is_what_the_command_prints(name: str) -> None:
    result = jetmoe("config", "schema", *([] if name == "run" else [name]))
    assert (result.returncode, result.stderr) == (0, "")
    wanted = f"write it with `jetmoe config schema {name} > configs/{name}.schema.json`"
    assert json.loads(FILES[name].read_text()) == json.loads(result.stdout) == editor_schema(name), wanted
    jsonschema.Draft7Validator.check_schema(editor_schema(name))


@pytest.mark.parametrize("path", YAMLS, ids=lambda path: f"{path.parent.name}/{path.name}")
def test_every_shipped_yaml_names_its_schema_and_follows_it(path: Path) -> None:
    first = path.read_text().splitlines()[0]
    named = re.fullmatch(r"# yaml-language-server: \$schema=(\S+)", first)
    assert named
    (name,) = [name for name, file in FILES.items() if file == (path.parent / named[1]).resolve()]
    assert errors(parse_yaml(path.read_text()), name) == []
    assert errors(as_editors_read(path), name) == []


def test_what_people_write() -> None:
    tree = small_run(Path("x"), DATA)
    tree["model"] = "../models/jetmoe_8b.yaml"
    tree["output_dir"] = "${OUTPUT}/run"
    tree["precision"] = "${PRECISION}"
    tree["phases"][0] = "phase1.yaml"
    tree["phases"][1]["tokens"] = parse_yaml("4e9")
    tree["phases"][1]["learning_rate"] = "${SHAPE}"
    tree["data"] = {"cache": None, "warn_epochs": 3}
    for off in (False, "off", "No", "OFF"):
        tree["logging"] = {"wandb": off, "tensorboard": off}
        assert errors(tree) == []
    for on in (True, "on", "online", "${WANDB}"):
        tree["logging"] = {"wandb": on}
        assert errors(tree) == []
    tree["parallel"] = {"sequence": "yes"}
    assert errors(tree) == []


# Relations between keys, what lies on the disk or in the environment, and what JSON lacks.
BEYOND = [
    ("model__top_k", 5),
    ("model__kv_channels", 7),
    ("optimizer__max_lr", float("inf")),
    ("batch__global_tokens", 250),
    ("schedule__warmup_tokens", 10**6),
    ("phases__1__name", "stable"),
    ("phases__0__data__1__name", "code"),
    ("phases__1__data__0__path", "elsewhere"),
    ("model", "missing.yaml"),
    ("output_dir", "${NOT_SET_ANYWHERE}/x"),
]
MARKED = [(key, value) for key, value, _ in BAD_VALUES if (key, value) not in BEYOND and value == value]  # no NaN


@pytest.mark.parametrize(("key", "value"), MARKED, ids=[f"{key}={value}"[:40] for key, value in MARKED])
def test_what_training_refuses_is_marked(tmp_path: Path, key: str, value: Any) -> None:
    assert errors(small_run(tmp_path, DATA, **{key: value}))


def test_no_default_of_a_section_is_written_twice() -> None:
    for schema in map(editor_schema, SCHEMAS):
        for part in [schema, *schema.get("definitions", {}).values()]:
            for key, spec in part["properties"].items():
                assert "$ref" not in spec or spec.keys() == {"$ref"}, key
                assert "$ref" in str(spec) or spec["description"], key
