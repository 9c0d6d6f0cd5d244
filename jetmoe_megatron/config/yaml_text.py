"""YAML text to values and back, with YAML 1.2's numbers. Nothing in a text runs code or grows beyond its length."""

from __future__ import annotations

import math
import re
from collections.abc import Iterator
from typing import Any

import yaml

# The keys and the numbers of list entries that lead to a value, as ("phases", 0, "tokens").
Location = tuple[Any, ...]

_INT, _FLOAT = "tag:yaml.org,2002:int", "tag:yaml.org,2002:float"


class _Loader(yaml.SafeLoader):
    """Reads YAML 1.2's numbers (PyYAML would read `1e12` and `5e-4` as text, `1:30` as 90), and each key only once.

    An alias inside a value that has an anchor is refused: a few such lines can stand for gigabytes, or for themselves.
    """

    _anchors = 0  # how many of the enclosing nodes have an anchor

    def compose_node(self, parent: yaml.Node | None, index: Any) -> yaml.Node | None:
        event = self.peek_event()
        if isinstance(event, yaml.AliasEvent):
            if self._anchors:
                problem = f"an alias (*{event.anchor}) inside a value that has an anchor (&name): write it out"
                raise yaml.MarkedYAMLError(problem=problem, problem_mark=event.start_mark)  # type: ignore[arg-type]
            return super().compose_node(parent, index)
        anchored = event.anchor is not None
        self._anchors += anchored
        node = super().compose_node(parent, index)
        self._anchors -= anchored
        return node

    def construct_integer(self, node: yaml.ScalarNode) -> int:
        """Underscores are allowed, although YAML 1.2 has dropped them."""
        text = self.construct_scalar(node).replace("_", "")
        return int(text, 0) if text.startswith(("0o", "0x")) else int(text)

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen: set[str] = set()
        for key, _ in node.value:
            if isinstance(key, yaml.ScalarNode) and key.value in seen:
                raise yaml.MarkedYAMLError(problem=f"{key.value!r} is there twice", problem_mark=key.start_mark)
            seen.add(str(key.value))
        return super().construct_mapping(node, deep)


_Loader.yaml_implicit_resolvers = {
    first: [(tag, pattern) for tag, pattern in resolvers if tag not in (_INT, _FLOAT)]
    for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
}
_Loader.add_implicit_resolver(
    _INT, re.compile(r"^[-+]?[0-9][0-9_]*$|^0o[0-7]+$|^0x[0-9a-fA-F]+$"), list("-+0123456789")
)
_Loader.add_constructor(_INT, _Loader.construct_integer)
_Loader.add_implicit_resolver(
    _FLOAT,
    re.compile(r"^[-+]?(\.[0-9]+|[0-9]+(\.[0-9]*)?)([eE][-+]?[0-9]+)?$|^[-+]?\.(inf|Inf|INF)$|^\.(nan|NaN|NAN)$"),
    list("-+0123456789."),
)


class _Dumper(yaml.SafeDumper):
    """Quotes each text that PyYAML or `_Loader` would read as something else."""


_Dumper.yaml_implicit_resolvers = {
    first: yaml.SafeDumper.yaml_implicit_resolvers.get(first, []) + _Loader.yaml_implicit_resolvers.get(first, [])
    for first in {*yaml.SafeDumper.yaml_implicit_resolvers, *_Loader.yaml_implicit_resolvers}
}


def parse_yaml(text: str) -> Any:
    """Raises ValueError that says in one line what is wrong, and where."""
    return parse_yaml_lines(text)[0]


def parse_yaml_lines(text: str) -> tuple[Any, dict[Location, int]]:
    """The value, and for each value in it the number of its line, from 1.

    Raises ValueError as `parse_yaml`.
    """
    try:
        loader = _Loader(text)  # a SafeLoader
        node = loader.get_single_node()
        if node is None:
            return None, {}
        value = loader.construct_document(node)
        return _apart(value), dict(_lines(node))  # after construct_document, which resolves merges (`<<`) in the node
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        mark = getattr(error, "problem_mark", None)
        line = f" line {mark.line + 1}:" if mark else ""
        problem = getattr(error, "problem", None) or str(error).split("\n")[0]
        raise ValueError(f"{line} not valid YAML: {problem}") from None


def _apart(node: Any) -> Any:
    """A copy without shared parts. Aliases share parts, so that changing one would change the other."""
    if isinstance(node, dict):
        return {key: _apart(value) for key, value in node.items()}
    return [_apart(value) for value in node] if isinstance(node, list) else node


def _lines(node: yaml.Node, where: Location = ()) -> Iterator[tuple[Location, int]]:
    yield where, node.start_mark.line + 1
    below: dict[Any, yaml.Node] = {}
    if isinstance(node, yaml.MappingNode):  # its own key comes after a merged one of the same name, and counts
        below = {key.value: value for key, value in node.value if isinstance(key, yaml.ScalarNode)}
    elif isinstance(node, yaml.SequenceNode):
        below = dict(enumerate(node.value))
    for key, value in below.items():
        yield from _lines(value, (*where, key))


def dump_yaml(value: Any) -> str:
    """In block style, one scalar per line. `parse_yaml` gives the same value."""
    return yaml.dump(value, Dumper=_Dumper, sort_keys=False, allow_unicode=True, width=math.inf)
