"""The resolved run as YAML, with the file and line, or the override, that each value comes from."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from jetmoe_megatron.config.load import dump_run, load_run_and_origins
from jetmoe_megatron.config.yaml_text import parse_yaml_lines
from jetmoe_megatron.errors import printable

_COLUMN = 40  # of the comments, if the value is short enough


def show(path: str | Path, overrides: Sequence[str] = ()) -> str:
    """What `dump_run` writes, with `# FILE:LINE`, `# override` or `# default` after each value. `load_run` can read it.

    Raises:
        UserError: as `load_run`.
    """
    run, origins = load_run_and_origins(path, overrides)
    text = dump_run(run)
    lines = text.splitlines()
    _, line_of = parse_yaml_lines(text)
    heads = {location[:-1] for location in line_of}
    for location, line in line_of.items():
        if location not in heads:
            origin = printable(origins.get(location, "default"))
            lines[line - 1] = f"{lines[line - 1]:<{_COLUMN}}  # {origin}"
    return "\n".join(lines) + "\n"
