"""Text from a file or its name must not move a terminal's cursor, forge a line, or reverse the text beside it."""

import argparse
import sys
import unicodedata
from typing import NoReturn, TextIO

# Control characters, invisible ones that change their neighbours (bidirectional marks, joiners), halves of surrogate
# pairs, and Unicode's own line and paragraph ends.
_UNPRINTABLE = ("Cc", "Cf", "Cs", "Zl", "Zp")


class _Spelled(dict[int, str]):
    """A table for `str.translate`: how to write each character, by its code point. Lookups are cached."""

    def __missing__(self, code: int) -> str:
        character = chr(code)
        hidden = unicodedata.category(character) in _UNPRINTABLE
        self[code] = character.encode("unicode_escape").decode() if hidden else character
        return self[code]


_LINE = _Spelled()
_LINES = _Spelled({ord("\n"): "\n", ord("\t"): "\t"})


def printable(text: str) -> str:
    """Text that is safe within a line: unprintable characters are spelled out, as \\n or \\u202e."""
    return text.translate(_LINE)


def printable_lines(text: str) -> str:
    """As `printable`, but line ends and tabs stay."""
    return text.translate(_LINES)


def say(line: object, file: TextIO | None = None) -> None:
    """Print one line, on stdout by default."""
    print(printable(str(line)), file=file, flush=True)


class Parser(argparse.ArgumentParser):
    """Its errors quote arguments, such as file names, and are made printable."""

    def error(self, message: str) -> NoReturn:
        super().error(printable(message))


def spell_what_the_terminal_lacks() -> None:
    """From now on a character that the encoding of stdout cannot express is spelled out, as on stderr."""
    if hasattr(sys.stdout, "reconfigure"):
        sys.stdout.reconfigure(errors="backslashreplace")
