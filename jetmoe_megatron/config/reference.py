"""All keys of a run file, or of a site file, as Markdown tables, generated from the schema."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator

from jetmoe_megatron.config.json_schema import SCHEMAS, Schema, plain_schema
from jetmoe_megatron.config.schema import MOST

_HEAD = "| key | type | default | meaning |\n|---|---|---|---|\n"


def reference(kind: str = "run") -> str:
    """A heading, a sentence and a table for each section, the top level first. kind: `run` or `site`."""
    top = plain_schema(SCHEMAS[kind])
    sections = {kind: top, **top["definitions"]}
    titles = dict(_titles(kind, "Top level", "", sections))
    tables = [
        f"## {title}\n\n{sections[name]['description']}\n\n{_HEAD}{''.join(_rows(sections[name], sections, titles))}"
        for name, title in titles.items()
    ]
    return "\n".join(tables)


def _titles(name: str, title: str, path: str, sections: dict[str, Schema]) -> Iterator[tuple[str, str]]:
    """Name and heading of a section, and of the sections in it. path: the prefix of its keys."""
    yield name, title
    for key, spec in sections[name]["properties"].items():
        where = f"{path}{key}"
        if below := _section_of(spec):
            yield from _titles(below, f"`{where}`", f"{where}.", sections)
        elif below := _section_of(spec.get("items", {})):
            yield from _titles(below, f"Each entry of `{where}`", f"{where}.N.", sections)


def _section_of(spec: Schema) -> str | None:
    references = [one["$ref"] for one in spec.get("anyOf", [spec]) if "$ref" in one]
    return references[0].rpartition("/")[2] if references else None


def _rows(section: Schema, sections: dict[str, Schema], titles: dict[str, str]) -> Iterator[str]:
    for key, spec in section["properties"].items():
        meaning = spec.get("description")
        if below := _section_of(spec):
            meaning = ", ".join(f"`{name}`" for name in sections[below]["properties"])
        if key in section.get("required", ()):
            default = "required"
        else:
            default = "its defaults" if below and spec["default"] is not None else f"`{_yaml(spec['default'])}`"
        cells = (f"`{key}`", _words(spec, titles), default, meaning)
        yield f"| {' | '.join(str(cell).replace('|', chr(92) + '|') for cell in cells)} |\n"


def _yaml(value: object) -> str:
    return value if isinstance(value, str) else json.dumps(value)


def _words(spec: Schema, titles: dict[str, str]) -> str:
    """The type of a value in words. `null` comes first: after a list it would look like an entry of the list."""
    if "anyOf" in spec:
        alternatives = sorted(spec["anyOf"], key=lambda one: one.get("type") != "null")
        return ", or ".join(_words(one, titles) for one in alternatives)
    if "$ref" in spec:
        return f"[section](#{_anchor(titles[spec['$ref'].rpartition('/')[2]])})"
    if choices := spec.get("enum") or ([spec["const"]] if "const" in spec else []):
        *first, last = (f"`{choice}`" for choice in choices)
        return f"{', '.join(first)} or {last}" if first else last
    if spec["type"] == "array":
        return f"list{_size(spec)}: {_words(spec['items'], titles)}"
    if spec["type"] == "string":
        return spec.get("title") or ("text, not empty" if spec.get("minLength") else "text")
    name = {"integer": "whole number", "number": "number", "boolean": "true or false", "null": "null"}[spec["type"]]
    return name + _range(spec)


def _anchor(title: str) -> str:
    """The anchor that GitHub gives to a heading."""
    return re.sub(r"[^\w -]", "", title.lower()).replace(" ", "-")


def _size(spec: Schema) -> str:
    least, most = spec.get("minItems"), spec.get("maxItems")
    if least == most:
        return f" of {least}" if least else ""
    return f" of {least} or more"


def _range(spec: Schema) -> str:
    lowest, above = spec.get("minimum"), spec.get("exclusiveMinimum")
    highest, below = spec.get("maximum"), spec.get("exclusiveMaximum")
    words = "" if lowest is None else f" from {lowest}"
    words += "" if above is None else f" above {above}"
    words += "" if below is None else f", below {below}"
    return words if highest in (None, MOST) else f"{words}, at most {highest:.15g}"
