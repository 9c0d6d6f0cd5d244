"""Lines to texts, and the one-line description of each way a line can be broken."""

from pathlib import Path

import pytest

from data_tools.parsing import parse
from data_tools.reading import Batch

BROKEN = {
    b'{"text": "\xff"}': "not valid UTF-8: invalid start byte at byte 11",
    b'{"text": "a"': "not valid JSON: Expecting ',' delimiter at column 13",
    b'\xef\xbb\xbf{"text": "a"}': "not valid JSON: Unexpected UTF-8 BOM (decode using utf-8-sig) at column 1",
    b'{"body": "a", "id": 1}': "no key 'text' (keys of this line: 'body', 'id')",
    b"{}": "no key 'text' (keys of this line: none)",
    b'{"text": 5}': "the value of 'text' is a number, not a string",
    b'{"text": true}': "the value of 'text' is a boolean, not a string",
    b'{"text": null}': "the value of 'text' is null, not a string",
    b'{"text": ["a"]}': "the value of 'text' is a list, not a string",
    b'{"text": {"a": 1}}': "the value of 'text' is an object, not a string",
    b'["text"]': "the line is a list, not an object with the key 'text'",
    b'"text"': "the line is a string, not an object with the key 'text'",
    b'{"text": "a\\ud800b"}': "the text is not valid Unicode: half a surrogate pair at character 2",
    b"[" * 200_000: "not usable JSON: nested too deeply",
}


@pytest.mark.parametrize("line", BROKEN, ids=range(len(BROKEN)))
def test_broken_line(line: bytes) -> None:
    good = b'{"text": "good"}\n'
    texts, problems = parse(Batch(Path("a.jsonl"), 7, [good, line + b"\n", good], ["a.jsonl: more"]), "text")
    assert texts == ["good", "good"]
    assert problems == [f"a.jsonl:8: {BROKEN[line]}", "a.jsonl: more"]


@pytest.mark.parametrize(
    ("line", "text"),
    [
        (b'{"text": "a", "id": {"text": "b"}}\n', "a"),
        (b'{"text": "a"}', "a"),
        (b'{"text": "a"}\r\n', "a"),
        (b'{"text": "\\ud83d\\ude42\\u0000"}\n', "🙂\x00"),
        ('{"text": "\u2028\x85"}\n'.encode(), "\u2028\x85"),
        (b'{"text": ""}\n', ""),
        (b" \r\n", ""),
        (b"", ""),
    ],
)
def test_good_line(line: bytes, text: str) -> None:
    assert parse(Batch(Path("a.jsonl"), 1, [line]), "text") == ([text], [])


def test_text_key() -> None:
    assert parse(Batch(Path("a.jsonl"), 1, [b'{"text": 1, "body": "b"}']), "body") == (["b"], [])
