"""Turn a line of JSON into its text, or say in one line what is wrong with it."""

import json
from collections.abc import Iterable
from itertools import pairwise
from typing import Any

import orjson

from data_tools.batch import Problem

# The index stores the length of a document in 31 bits, and each byte can become a token.
LONGEST = 2**31 - 2


def parse(lines: Iterable[bytes], first_line: int, text_key: str) -> tuple[list[str], list[Problem]]:
    """Texts and problems of lines, both in the order of the lines. A blank line is an empty text.

    Every text returned can be encoded as UTF-8.
    """
    texts: list[str] = []
    problems: list[Problem] = []
    spelled = json.dumps(text_key, ensure_ascii=False).encode("utf-8", "surrogatepass")
    for number, line in enumerate(lines, first_line):
        try:
            texts.append(_text_of(line, text_key, spelled))
        except (ValueError, RecursionError) as error:
            problems.append((number, _describe(error)))
    return texts, problems


def decode(raw: bytes) -> str:
    """UTF-8 bytes as text. Raises ValueError if they are not UTF-8, or too many for one document."""
    if len(raw) > LONGEST:
        raise ValueError(f"{len(raw)} bytes; one document may have {LONGEST}")
    return raw.decode("utf-8")


def _has_escaped_key(line: bytes) -> bool:
    """Whether a key may be written with \\u escapes: it could be the text key, a second time."""
    parts = line.split(b'"')
    return any(b"\\u" in part and after.lstrip().startswith(b":") for part, after in pairwise(parts))


def _text_of(line: bytes, text_key: str, spelled: bytes) -> str:
    if line.count(spelled) == 1 and not (b"\\u" in line and _has_escaped_key(line)):
        try:
            text = orjson.loads(line)[text_key]
            if type(text) is str and len(line) <= LONGEST:
                return text
        except (ValueError, TypeError, KeyError):
            pass  # the slower parser finds out whether the line is wrong, and how
    if not line.strip():
        return ""
    record = json.loads(decode(line).rstrip(), object_pairs_hook=_Object, parse_int=float)
    if not isinstance(record, _Object):
        raise ValueError(f"the line is {_kind(record)}, not an object with the key {text_key!r}")
    values = [value for key, value in record if key == text_key]
    if not values:
        keys = ", ".join(repr(key) for key, _ in record)
        raise ValueError(f"no key {text_key!r} (keys of this line: {keys[:200] or 'none'})")
    if len(values) > 1:
        raise ValueError(f"{len(values)} values of the key {text_key!r}")
    (text,) = values
    if not isinstance(text, str):
        raise ValueError(f"the value of {text_key!r} is {_kind(text)}, not a string")
    text.encode("utf-8")  # JSON's \u escapes can spell half a surrogate pair, which no tokenizer accepts
    return text


class _Object(list[tuple[str, Any]]):
    """A JSON object as a list of pairs: a dictionary would hide that a key occurs twice."""


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
        float: "a number",
        str: "a string",
        list: "a list",
        _Object: "an object",
    }
    return kinds[type(value)]
