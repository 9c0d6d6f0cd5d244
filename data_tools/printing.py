"""What a file or its name says may not move a terminal's cursor, forge a line, or turn around what is beside it."""

import argparse
import sys
import unicodedata
from typing import NoReturn, TextIO

# Control characters, invisible ones that change their neighbours (bidirectional marks, joiners), halves of surrogate
# pairs, and Unicode's own line and paragraph ends.
_UNPRINTABLE = ("Cc", "Cf", "Cs", "Zl", "Zp")


class _Spelled(dict[int, str]):
    """How `str.translate` is to write each character, by its number; what was looked up is kept."""

    def __missing__(self, code: int) -> str:
        character = chr(code)
        hidden = unicodedata.category(character) in _UNPRINTABLE
        self[code] = character.encode("unicode_escape").decode() if hidden else character
        return self[code]


_LINE = _Spelled()
_LINES = _Spelled({ord("\n"): "\n", ord("\t"): "\t"})


def printable(text: str) -> str:
    """Text for a part of a line: what cannot be printed in one is spelled out, as \\n or \\u202e."""
    return text.translate(_LINE)


def printable_lines(text: str) -> str:
    """The same of a text that has lines and tabs of its own."""
    return text.translate(_LINES)


def say(line: object, file: TextIO | None = None) -> None:
    """Print one line, on stdout by default."""
    print(printable(str(line)), file=file, flush=True)


class Parser(argparse.ArgumentParser):
    """What it says of arguments, which may be names of files, can be printed."""

    def error(self, message: str) -> NoReturn:
        super().error(printable(message))


def spell_what_the_terminal_lacks() -> None:
    """From now on a character that the encoding of stdout cannot express is spelled out, as on stderr."""
    if hasattr(sys.stdout, "reconfigure"):
        sys.stdout.reconfigure(errors="backslashreplace")
