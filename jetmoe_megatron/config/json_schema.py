"""JSON schemas of a run file and of the files that it names, for editors that complete, explain and check them.

A schema accepts what training accepts. It cannot express relations between keys, nor tell `off` from `"off"`.
"""

from __future__ import annotations

from typing import Any

from pydantic.json_schema import GenerateJsonSchema

from jetmoe_megatron.config.hardware import Hardware
from jetmoe_megatron.config.schema import Model, Phase, Run, Section
from jetmoe_megatron.config.site import Site

Schema = dict[str, Any]

SCHEMAS: dict[str, type[Section]] = {  # by the kind of file
    "run": Run,
    "model": Model,
    "phase": Phase,
    "site": Site,
    "hardware": Hardware,
}
# yaml-language-server, which most editors run, supports no later draft.
_DRAFT = "http://json-schema.org/draft-07/schema#"
_VARIABLE = {"type": "string", "pattern": r"\$\{\w+\}"}
# Our loader reads these as booleans, as in YAML 1.1. Editors read YAML 1.2, where they are text.
_WORDS = ("yes", "Yes", "YES", "no", "No", "NO", "on", "On", "ON", "off", "Off", "OFF")
_BOOLEAN_WORD = {"type": "string", "pattern": f"^({'|'.join(_WORDS)})$"}


class _Generator(GenerateJsonSchema):
    def field_title_should_be_set(self, schema: Any) -> bool:
        """pydantic would give `max_lr` the title "Max Lr"."""
        return False


def plain_schema(section: type[Section]) -> Schema:
    """The schema of the values of `section`, each description on one line; its sections are in `definitions`."""
    schema: Schema = section.model_json_schema(ref_template="#/definitions/{model}", schema_generator=_Generator)
    definitions = schema.pop("$defs", {})
    return _on_one_line({**schema, **({"definitions": definitions} if definitions else {})})


def editor_schema(kind: str) -> Schema:
    """The schema of a file as written, before environment variables are inserted. kind: a key of `SCHEMAS`."""
    schema = _as_written(plain_schema(SCHEMAS[kind]))
    return {"$schema": _DRAFT, **schema, "title": f"JetMoE {kind} file"}


def _on_one_line(node: Any) -> Any:
    if isinstance(node, dict):
        return {key: _on_one_line(value) for key, value in node.items()}
    if isinstance(node, list):
        return [_on_one_line(value) for value in node]
    return " ".join(node.split()) if isinstance(node, str) else node


def _as_written(node: Any) -> Any:
    """Add the other ways to write a choice or a boolean, and leave out the defaults of whole sections."""
    if isinstance(node, list):
        return [_as_written(value) for value in node]
    if not isinstance(node, dict):
        return node
    if "$ref" in node:
        return {"$ref": node["$ref"]}
    if "enum" in node or "const" in node:
        return _also(node, _VARIABLE)
    if node.get("type") == "boolean":
        return _also(node, _BOOLEAN_WORD)
    written = {key: _as_written(value) for key, value in node.items()}
    if "anyOf" in written:
        written["anyOf"] = [one for entry in written["anyOf"] for one in entry.get("anyOf", [entry])]
    return written


def _also(node: Schema, other: Schema) -> Schema:
    choice = dict(node)
    kept: Schema = {key: choice.pop(key) for key in ("description", "default") if key in node}
    return {**kept, "anyOf": [choice, other]}
