"""Lines to texts, and the one-line description of each way a line can be broken."""

import json

import pytest

from data_tools import parsing
from data_tools.parsing import parse

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
    b'{"text": "a", "x": ' + b"[" * 200_000: "not usable JSON: nested too deeply",
    b'{"text": "a", "text": "b"}': "2 values of the key 'text'",
    b'{"text": "a", "text": 1}': "2 values of the key 'text'",
    b'{"text": "a", "te\\u0078t": "b"}': "2 values of the key 'text'",
    b'{"te\\u0078t" : "a", "text": "b"}': "2 values of the key 'text'",
    b'{"text": "a\x00b"}': "not valid JSON: Invalid control character at at column 12",
    b"\x00\x00\x00": "not valid JSON: Expecting value at column 1",
    b'{"text": %s}' % (b"9" * 5000): "the value of 'text' is a number, not a string",
}


@pytest.mark.parametrize("line", BROKEN, ids=range(len(BROKEN)))
def test_broken_line(line: bytes) -> None:
    good = b'{"text": "good"}'
    assert parse([good, line, good], 7, "text") == (["good", "good"], [(8, BROKEN[line])])


@pytest.mark.parametrize(
    ("line", "text"),
    [
        (b'{"text": "a", "id": {"text": "b"}}', "a"),
        (b'{"text": "a", "id": [{"text": "b", "text": "c"}], "type": "text"}', "a"),
        (b'{"text": "a"}', "a"),
        (b' {"text": "a"} \r', "a"),
        (b'{"te\\u0078t": "a"}', "a"),
        (b'{"text": "a", "id": 1, "id": %s}' % (b"9" * 5000), "a"),
        (b'{"text": "a", "n": [NaN, -Infinity, 1e999]}', "a"),
        (b'{"text": "\\ud83d\\ude42\\u0000"}', "🙂\x00"),
        ('{"text": "\u2028\x85"}'.encode(), "\u2028\x85"),
        (b'{"text": ""}', ""),
        (b" \r", ""),
        (b"", ""),
    ],
)
def test_good_line(line: bytes, text: str) -> None:
    assert parse([line], 1, "text") == ([text], [])


def test_text_key() -> None:
    assert parse([b'{"text": 1, "body": "b"}'], 1, "body") == (["b"], [])
    assert parse(['{"größe": "b"}'.encode(), rb'{"gr\u00f6\u00dfe": "c"}'], 1, "größe") == (["b", "c"], [])


def test_both_parsers_agree(texts: list[str]) -> None:
    """The fast one is left out where a line spells the key twice."""
    for text in [*texts, "".join(map(chr, range(0xD800))), "\ufdd0\uffff\U0010ffff"]:
        for ascii_only in (True, False):
            fast, slow = ({"text": text, "kind": kind} for kind in ("x", "text"))
            lines = [json.dumps(record, ensure_ascii=ascii_only).encode() for record in (fast, slow)]
            assert parse(lines, 1, "text") == ([text, text], [])


def test_a_text_longer_than_an_index_entry_counts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(parsing, "LONGEST", 20)
    fits, longer = b'{"text": "12345678"}', b'{"text": "123456789"}'
    assert parse([fits, longer], 1, "text") == (["12345678"], [(2, "21 bytes; one document may have 20")])
