"""Turn raw lines of JSON into texts, and say in one line what is wrong with those that are not."""

import json
from typing import Any

from data_tools.reading import Batch


def parse(batch: Batch, text_key: str) -> tuple[list[str], list[str]]:
    """Texts and problems of a batch, each in the order of its lines; a blank line is an empty text.

    A problem reads `file:line: what is wrong`. Every text returned can be encoded as UTF-8.
    """
    texts: list[str] = []
    problems: list[str] = []
    for number, line in enumerate(batch.lines, batch.first_line):
        try:
            texts.append(_text_of(line, text_key) if line.strip() else "")
        except (ValueError, RecursionError) as error:
            problems.append(f"{batch.path}:{number}: {_describe(error)}")
    return texts, problems + batch.problems


def _text_of(line: bytes, text_key: str) -> str:
    record = json.loads(line.decode("utf-8").rstrip())
    if not isinstance(record, dict):
        raise ValueError(f"the line is {_kind(record)}, not an object with the key {text_key!r}")
    if text_key not in record:
        keys = ", ".join(map(repr, record))
        raise ValueError(f"no key {text_key!r} (keys of this line: {keys[:200] or 'none'})")
    text = record[text_key]
    if not isinstance(text, str):
        raise ValueError(f"the value of {text_key!r} is {_kind(text)}, not a string")
    text.encode("utf-8")  # JSON's \u escapes can spell half a surrogate pair, which no tokenizer takes
    return text


def _describe(error: ValueError | RecursionError) -> str:
    if isinstance(error, json.JSONDecodeError):
        return f"not valid JSON: {error.msg} at column {error.colno}"
    if isinstance(error, UnicodeDecodeError):
        return f"not valid UTF-8: {error.reason} at byte {error.start + 1}"
    if isinstance(error, UnicodeEncodeError):
        return f"the text is not valid Unicode: half a surrogate pair at character {error.start + 1}"
    if isinstance(error, RecursionError):
        return "not usable JSON: nested too deeply"
    return str(error)


def _kind(value: Any) -> str:
    if value is None:
        return "null"
    kinds = {
        bool: "a boolean",
        int: "a number",
        float: "a number",
        str: "a string",
        list: "a list",
        dict: "an object",
    }
    return kinds[type(value)]
