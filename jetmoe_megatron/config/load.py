"""From YAML files and `key.sub=value` overrides to a checked `Run`, and back."""

from __future__ import annotations

import difflib
import os
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any, TypeVar, get_args, get_origin

import yaml
from pydantic import BaseModel, ValidationError

from jetmoe_megatron.config.checks import check_run
from jetmoe_megatron.config.schema import Run
from jetmoe_megatron.errors import UserError, printable

_Sections = TypeVar("_Sections", bound=BaseModel)
_INT, _FLOAT = "tag:yaml.org,2002:int", "tag:yaml.org,2002:float"


class _Loader(yaml.SafeLoader):
    """YAML 1.2's numbers (PyYAML would read `1e12` and `5e-4` as text, `1:30` as 90), and each key once.

    No aliases within what has an anchor: a few lines of these stand for gigabytes, or for themselves.
    """

    _anchors = 0  # of nodes around the one that is read

    def compose_node(self, parent: yaml.Node | None, index: Any) -> yaml.Node | None:
        event = self.peek_event()
        if isinstance(event, yaml.AliasEvent):
            if self._anchors:
                problem = f"an alias (*{event.anchor}) within what has an anchor (&name): write it out"
                raise yaml.MarkedYAMLError(problem=problem, problem_mark=event.start_mark)  # type: ignore[arg-type]
            return super().compose_node(parent, index)
        anchored = event.anchor is not None
        self._anchors += anchored
        node = super().compose_node(parent, index)
        self._anchors -= anchored
        return node

    def construct_integer(self, node: yaml.ScalarNode) -> int:
        """With underscores, which YAML 1.2 has dropped."""
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


def load_run(path: str | Path, overrides: Sequence[str] = ()) -> Run:
    """Read a run file, the model and phase files it names, and `section.key=value` overrides.

    Paths of model and phase files are relative to the run file; those of data, tokenizer and output to the working
    directory. `${NAME}` is an environment variable's value.

    Raises:
        UserError: one line that names the file and the key.
    """
    path = Path(path)
    tree = _read(path)
    for override in overrides:
        if "." not in override.partition("=")[0]:  # `model=other.yaml` comes before what is in the file is read
            _apply(tree, override)
    if isinstance(tree.get("model"), str):
        tree["model"] = _read(path.parent / tree["model"], named_in=path)
    if isinstance(tree.get("phases"), list):
        tree["phases"] = [
            _read(path.parent / entry, named_in=path) if isinstance(entry, str) else entry for entry in tree["phases"]
        ]
    for override in overrides:
        if "." in override.partition("=")[0]:
            _apply(tree, override)
    try:
        run = Run.model_validate(_expand(tree))
        check_run(run)
    except ValidationError as error:
        raise UserError(f"{path}: {_first_line(error)}") from None
    except UserError as error:
        raise UserError(f"{path}: {error}") from None
    return run


def load_sections(path: Path, schema: type[_Sections]) -> _Sections:
    """The sections that `schema` has of a resolved run file; the others may be those of another version.

    Raises:
        UserError: one line that names the file and the key.
    """
    tree = _read(path)
    try:
        return schema.model_validate({key: value for key, value in tree.items() if key in schema.model_fields})
    except ValidationError as error:
        raise UserError(f"{path}: {_first_line(error)}") from None


def dump_run(run: Run) -> str:
    """The resolved run as one YAML text, which `load_run` reads again."""
    return yaml.safe_dump(run.model_dump(), sort_keys=False, allow_unicode=True)


def _read(path: Path, named_in: Path | None = None) -> dict[str, Any]:
    where = f" (named in {named_in})" if named_in else ""
    try:
        tree = parse_yaml(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(f"{path}{where}: {error.strerror}") from None
    except UnicodeDecodeError:
        raise UserError(f"{path}{where}: not a UTF-8 text file") from None
    except ValueError as error:
        raise UserError(f"{path}{where}:{error}") from None
    if not isinstance(tree, dict):
        raise UserError(f"{path}{where}: expected `key: value` lines at the top, found {_kind(tree)}")
    return tree


def parse_yaml(text: str) -> Any:
    """Raises ValueError that says in one line what is wrong, and where."""
    try:
        return yaml.load(text, Loader=_Loader)  # a SafeLoader
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        mark = getattr(error, "problem_mark", None)
        line = f" line {mark.line + 1}:" if mark else ""
        problem = getattr(error, "problem", None) or str(error).split("\n")[0]
        raise ValueError(f"{line} not valid YAML: {problem}") from None


def _apply(tree: dict[str, Any], override: str) -> None:
    """Set one `a.b.c=value`; a number in the path picks a list entry, as in `phases.0.tokens=1e6`."""
    dotted, equals, text = override.partition("=")
    if not equals or not dotted:
        raise UserError(f"override {override!r}: write it as section.key=value")
    try:
        value = parse_yaml(text)
    except ValueError:
        raise UserError(f"override {override!r}: the value is not valid YAML") from None
    node: Any = tree
    *parents, last = dotted.split(".")
    for i, key in enumerate(parents):
        if isinstance(node, dict):
            node = node.setdefault(key, {})
        elif isinstance(node, list) and key.isdecimal() and int(key) < len(node):
            node = node[int(key)]
        else:
            raise UserError(f"override {override!r}: there is no {'.'.join(parents[: i + 1])!r} to set")
    if isinstance(node, dict):
        node[last] = value
    elif isinstance(node, list) and last.isdecimal() and int(last) < len(node):
        node[int(last)] = value
    else:
        raise UserError(f"override {override!r}: {'.'.join(parents)!r} has no key {last!r}")


def _expand(node: Any, where: str = "") -> Any:
    """Replace `${NAME}` by the environment's value, and `~/` at the beginning by the home folder.

    No text may hold what cannot be printed in a line.
    """
    if isinstance(node, dict):
        return {_expand(key, where): _expand(value, f"{where}.{key}".lstrip(".")) for key, value in node.items()}
    if isinstance(node, list):
        return [_expand(value, f"{where}.{i}") for i, value in enumerate(node)]
    if not isinstance(node, str):
        return node

    def value_of(match: re.Match[str]) -> str:
        if match[1] not in os.environ:
            raise UserError(f"{where}: the environment variable {match[1]} is not set")
        return os.environ[match[1]]

    text = re.sub(r"\$\{(\w+)\}", value_of, node)
    if printable(text) != text:
        raise UserError(f"{where or 'the run'}: {text!r} holds a control character, an invisible one, or half of one")
    return os.path.expanduser(text) if text.startswith("~/") else text


def _first_line(error: ValidationError) -> str:
    """The first thing wrong, as `section.key: what to change`."""
    problems = error.errors()
    unknown_first = sorted(problems, key=lambda problem: problem["type"] != "extra_forbidden")
    problem = unknown_first[0]
    more = f" ({len(problems) - 1} more)" if len(problems) > 1 else ""
    if problem["type"] == "extra_forbidden":
        return f"{_dotted(problem['loc'])}: unknown key{_nearest(problem['loc'])}{more}"
    where = _dotted(_real_location(problem["loc"]))
    if problem["type"] == "missing":
        return f"{where}: required key is missing{more}"
    return f"{where}: {_message(problem)}, not {_shown(problem['input'])}{more}"


def _dotted(location: Sequence[Any]) -> str:
    return ".".join(str(part) or "''" for part in location)


def _message(problem: Any) -> str:
    text = problem["msg"]
    text = text.replace("Input should be", "must be").replace("List should have", "must have")
    return text.replace("String should have", "must have")


def _shown(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "..."


def _kind(value: Any) -> str:
    return {type(None): "nothing", list: "a list", str: "text"}.get(type(value), type(value).__name__)


def _real_location(location: tuple[Any, ...]) -> list[Any]:
    """Pydantic adds the tried branch of a union (`bool`, `literal[...]`) to a location; keys and indices remain."""
    kept: list[Any] = []
    for part in location:
        if isinstance(part, str) and ("[" in part or part in {"bool", "int", "constrained-int"}):
            continue
        kept.append(part)
    return kept


def _nearest(location: tuple[Any, ...]) -> str:
    known = _known_keys(Run, location[:-1])
    close = difflib.get_close_matches(str(location[-1]), known, n=1, cutoff=0.5)
    return f"; did you mean {close[0]!r}?" if close else f"; known keys are {', '.join(known)}"


def _known_keys(section: type[BaseModel], location: tuple[Any, ...]) -> list[str]:
    for part in location:
        if isinstance(part, int):
            continue
        annotation = section.model_fields[part].annotation
        while get_origin(annotation) is list:
            annotation = get_args(annotation)[0]
        assert isinstance(annotation, type)
        section = annotation
    return list(section.model_fields)
