"""From YAML files and `key.sub=value` overrides to a checked `Run`, and back."""

from __future__ import annotations

import difflib
import os
import re
from collections.abc import Sequence
from pathlib import Path
from types import UnionType
from typing import Annotated, Any, TypeVar, get_args, get_origin

from pydantic import BaseModel, ValidationError

from jetmoe_megatron.config.checks import check_run
from jetmoe_megatron.config.schema import Run
from jetmoe_megatron.config.yaml_text import Location, dump_yaml, parse_yaml_lines
from jetmoe_megatron.errors import UserError, printable

_Sections = TypeVar("_Sections", bound=BaseModel)
# Where each value was set: `FILE:LINE` or OVERRIDE. Values without an origin are defaults.
Origins = dict[Location, str]
OVERRIDE = "override"


def load_run(path: str | Path, overrides: Sequence[str] = (), need_variables: bool = True) -> Run:
    """Read a run file, the model and phase files it names, and `section.key=value` overrides.

    Paths of model and phase files are relative to the run file; those of data, tokenizer and output to the working
    directory. `${NAME}` is an environment variable's value.

    Args:
        need_variables: false leaves `${NAME}` as it is where no such variable is set: for what opens none of the paths.

    Raises:
        UserError: one line that names the file and the key.
    """
    return load_run_and_origins(path, overrides, need_variables)[0]


def load_run_and_origins(
    path: str | Path, overrides: Sequence[str] = (), need_variables: bool = True
) -> tuple[Run, Origins]:
    """As `load_run`, and also where each value was set, except defaults."""
    path = Path(path)
    tree, origins = _read(path)
    for override in overrides:
        if "." not in override.partition("=")[0]:  # `model=other.yaml` must come before the model file is read
            _apply(tree, origins, override)
    if isinstance(tree.get("model"), str):
        tree["model"], of_model = _read(path.parent / tree["model"], named_in=path)
        _replace(origins, ("model",), of_model)
    if isinstance(phases := tree.get("phases"), list):
        for number, entry in enumerate(phases):
            if isinstance(entry, str):
                phases[number], of_phase = _read(path.parent / entry, named_in=path)
                _replace(origins, ("phases", number), of_phase)
    for override in overrides:
        if "." in override.partition("=")[0]:
            _apply(tree, origins, override)
    try:
        run = Run.model_validate(_expand(tree, need_variables=need_variables))
        check_run(run)
    except ValidationError as error:
        raise UserError(f"{path}: {_first_line(error, Run)}") from None
    except UserError as error:
        raise UserError(f"{path}: {error}") from None
    return run, origins


def load_file(path: Path, schema: type[_Sections]) -> _Sections:
    """A file of another kind, with `${NAME}` as in a run file.

    Raises:
        UserError: one line that names the file and the key.
    """
    tree, _ = _read(path)
    try:
        return schema.model_validate(_expand(tree))
    except ValidationError as error:
        raise UserError(f"{path}: {_first_line(error, schema)}") from None
    except UserError as error:
        raise UserError(f"{path}: {error}") from None


def load_sections(path: Path, schema: type[_Sections]) -> _Sections:
    """The sections of a resolved run file that `schema` has. The other sections may come from another version.

    Raises:
        UserError: one line that names the file and the key.
    """
    tree, _ = _read(path)
    try:
        return schema.model_validate({key: value for key, value in tree.items() if key in schema.model_fields})
    except ValidationError as error:
        raise UserError(f"{path}: {_first_line(error, schema)}") from None


def dump_run(run: Run) -> str:
    """The resolved run as one YAML text, which `load_run` reads again."""
    return dump_yaml(run.model_dump())


def _read(path: Path, named_in: Path | None = None) -> tuple[dict[str, Any], Origins]:
    where = f" (named in {named_in})" if named_in else ""
    try:
        tree, lines = parse_yaml_lines(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(f"{path}{where}: {error.strerror}") from None
    except UnicodeDecodeError:
        raise UserError(f"{path}{where}: not a UTF-8 text file") from None
    except ValueError as error:
        raise UserError(f"{path}{where}:{error}") from None
    if not isinstance(tree, dict):
        raise UserError(f"{path}{where}: expected `key: value` lines at the top, found {_kind(tree)}")
    return tree, {location: f"{path}:{line}" for location, line in lines.items()}


def _replace(origins: Origins, location: Location, below: Origins) -> None:
    """Record that the value at `location` was replaced by one with the origins `below`."""
    for old in [old for old in origins if old[: len(location)] == location]:
        del origins[old]
    origins.update({(*location, *inner): origin for inner, origin in below.items()})


def _apply(tree: dict[str, Any], origins: Origins, override: str) -> None:
    """Set one `a.b.c=value`; a number in the path picks a list entry, as in `phases.0.tokens=1e6`."""
    dotted, equals, text = override.partition("=")
    if not equals or not dotted:
        raise UserError(f"override {override!r}: write it as section.key=value")
    try:
        value, lines = parse_yaml_lines(text)
    except ValueError:
        raise UserError(f"override {override!r}: the value is not valid YAML") from None
    node: Any = tree
    *parents, last = dotted.split(".")
    location: Location = ()
    for i, key in enumerate(parents):
        if (step := _step(node, key)) is None:
            raise UserError(f"override {override!r}: there is no {'.'.join(parents[: i + 1])!r} to set")
        node = node.setdefault(step, {}) if isinstance(node, dict) else node[step]
        location = (*location, step)
    if (step := _step(node, last)) is None:
        raise UserError(f"override {override!r}: {'.'.join(parents)!r} has no key {last!r}")
    node[step] = value
    _replace(origins, (*location, step), dict.fromkeys(lines, OVERRIDE))


def _step(node: Any, key: str) -> str | int | None:
    """The key of a mapping, or the number of an entry of a list, that an override means; None if there is none."""
    if isinstance(node, list):
        return int(key) if key.isdecimal() and int(key) < len(node) else None
    return key if isinstance(node, dict) else None


def _expand(node: Any, where: str = "", need_variables: bool = True) -> Any:
    """Replace `${NAME}` by the environment's value, and `~/` at the beginning by the home folder.

    Raises UserError if a variable that is needed is not set, or if a text has characters that cannot be printed in a
    line.
    """
    if isinstance(node, dict):
        return {
            _expand(key, where, need_variables): _expand(value, f"{where}.{key}".lstrip("."), need_variables)
            for key, value in node.items()
        }
    if isinstance(node, list):
        return [_expand(value, f"{where}.{i}", need_variables) for i, value in enumerate(node)]
    if not isinstance(node, str):
        return node

    def value_of(match: re.Match[str]) -> str:
        if match[1] not in os.environ:
            if not need_variables:
                return match[0]
            raise UserError(f"{where}: the environment variable {match[1]} is not set")
        return os.environ[match[1]]

    text = re.sub(r"\$\{(\w+)\}", value_of, node)
    if printable(text) != text:
        raise UserError(
            f"{where or 'the run'}: {text!r} holds a control character, an invisible one, or half of a surrogate pair"
        )
    return os.path.expanduser(text) if text.startswith("~/") else text


def _first_line(error: ValidationError, schema: type[BaseModel]) -> str:
    """The first thing wrong, as `section.key: what to change`."""
    problems = error.errors()
    unknown_first = sorted(problems, key=lambda problem: problem["type"] != "extra_forbidden")
    problem = unknown_first[0]
    more = f" ({len(problems) - 1} more)" if len(problems) > 1 else ""
    if problem["type"] == "extra_forbidden":
        return f"{_dotted(problem['loc'])}: unknown key{_nearest(problem['loc'], schema)}{more}"
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
    """Keys and indices only. Pydantic adds the tried branch of a union (`bool`, `literal[...]`) to a location."""
    kept: list[Any] = []
    for part in location:
        if isinstance(part, str) and ("[" in part or part in {"bool", "int", "constrained-int"}):
            continue
        kept.append(part)
    return kept


def _nearest(location: tuple[Any, ...], schema: type[BaseModel]) -> str:
    known = _known_keys(schema, location[:-1])
    close = difflib.get_close_matches(str(location[-1]), known, n=1, cutoff=0.5)
    return f"; did you mean {close[0]!r}?" if close else f"; known keys are {', '.join(known)}"


def _known_keys(section: type[BaseModel], location: tuple[Any, ...]) -> list[str]:
    for part in location:
        if isinstance(part, int):
            continue
        annotation = section.model_fields[part].annotation
        while get_origin(annotation) in (list, Annotated, UnionType):
            annotation = get_args(annotation)[0]
        assert isinstance(annotation, type)
        section = annotation
    return list(section.model_fields)
