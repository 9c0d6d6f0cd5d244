"""Control and invisible characters from files are spelled out on a terminal."""

import os
import subprocess
import sys
import unicodedata
from pathlib import Path

import pytest

from data_tools.errors import InputError, one_line
from data_tools.printing import Parser, printable, printable_lines
from data_tools.tokenizer import train_bpe

REPOSITORY = Path(__file__).parents[2]
# Clears the screen, names the window, forges a row, turns what follows around, hides, and is half a character.
HOSTILE = "a\x1b[2J\x9b1m\rb\nerror: c\u2028d\u202ee\u2066f\u200bg\udcffh\x00"


def test_everything_that_is_not_seen_as_it_is_read_is_spelled_out() -> None:
    said = printable(HOSTILE)
    assert said == r"a\x1b[2J\x9b1m\rb\nerror: c\u2028d\u202ee\u2066f\u200bg\udcffh\x00"
    every = printable("".join(map(chr, range(sys.maxunicode + 1))))
    assert not {unicodedata.category(character) for character in every} & {"Cc", "Cf", "Cs", "Zl", "Zp"}
    assert every.encode()
    plain = "naïve 漢字\u3000ελ 🙂 \\n"
    assert printable(plain) == plain
    assert printable_lines("a\tb\nc\r\n\x1b") == "a\tb\nc\\r\n\\x1b"


def test_an_error_is_one_line_whatever_it_names() -> None:
    assert one_line(InputError(HOSTILE)) == one_line(OSError(2, "gone", HOSTILE)).removesuffix(": gone")
    assert len(one_line(InputError(HOSTILE)).splitlines()) == 1


def run(*arguments: str | Path, **environment: str) -> subprocess.CompletedProcess[bytes]:
    command = [sys.executable, "-m", "data_tools", *map(str, arguments)]
    return subprocess.run(command, capture_output=True, cwd=REPOSITORY, env={**os.environ, **environment}, timeout=120)


@pytest.fixture
def hostile_texts(tmp_path: Path) -> Path:
    """A file and a key with hostile names; one line is broken, one text is hostile."""
    path = tmp_path / f"{HOSTILE[:-2]}.jsonl"
    path.write_bytes(b'{"text": "a\\u001b[2Jb\\u202ec\\n\\td"}\n{"a\\u001b[2J": 1}\nnull\n')
    return path


def test_commands_print_nothing_raw(tmp_path: Path, hostile_texts: Path) -> None:
    """Names, keys and texts: in errors, in notes, in the list of broken lines, and in `inspect --document`."""
    good = tmp_path / "good.txt"
    good.write_text("some text " * 10)
    train_bpe([good], 260, tmp_path / "bpe")
    out = tmp_path / "out\x1b[2J\n"
    options = ("--tokenizer", tmp_path / "bpe", "--output", out)
    failed = run("tokenize", hostile_texts, *options)
    skipped = run("tokenize", hostile_texts, *options, "--on-error", "skip")
    shown = run("inspect", out, "--document", "0", "--tokenizer", tmp_path / "bpe")
    summed = run("inspect", out)
    assert (failed.returncode, skipped.returncode, shown.returncode, summed.returncode) == (2, 0, 0, 0)
    assert len(failed.stderr.decode().splitlines()) == 1
    listed = Path(f"{out}.skipped.txt").read_text()
    assert len(listed.splitlines()) == 2
    for said in (failed, skipped, shown, summed):
        text = (said.stdout + said.stderr).decode()
        assert printable_lines(text) == text
    assert printable_lines(listed) == listed
    assert shown.stdout.decode().splitlines()[2:] == [r"a\x1b[2Jb\u202ec", "\td</s>"]


def test_a_name_that_the_terminal_cannot_show(tmp_path: Path) -> None:
    texts = tmp_path / "in.txt"
    texts.write_text("some text " * 10)
    done = run("tokenizer", texts, "--vocab-size", "260", "--output", tmp_path / "λ", PYTHONIOENCODING="ascii")
    assert (done.returncode, done.stderr) == (0, b"")
    assert rb"\u03bb: vocabulary of 260" in done.stdout


def test_arguments_that_are_not_understood(capsys: pytest.CaptureFixture[str]) -> None:
    """`jetmoe report runs/*` takes whatever names there are."""
    with pytest.raises(SystemExit):
        Parser(prog="p").parse_args([HOSTILE])
    assert capsys.readouterr().err == f"usage: p [-h]\np: error: unrecognized arguments: {printable(HOSTILE)}\n"
