"""The number of steps in `common.pt`: a damaged or crafted file is refused with a short reason."""

from __future__ import annotations

import struct
from pathlib import Path

import pytest

from jetmoe_megatron.checkpoint.common_state import COMMON, read_optimizer_steps, write_common

# Where an entry of a zip file's directory has its two sizes (PKWARE's APPNOTE.TXT 4.3.12).
_ENTRY, _SIZES = b"PK\x01\x02", slice(20, 28)


@pytest.mark.parametrize(
    ("size", "reason"),
    [
        pytest.param(60000, "EOFError", id="an entry longer than the file"),
        pytest.param(2**17, "more than a few values", id="a large entry"),
    ],
)
def test_a_crafted_file_is_refused(size: int, reason: str, tmp_path: Path) -> None:
    write_common(tmp_path, 7)
    assert read_optimizer_steps(tmp_path) == 7
    content = bytearray((tmp_path / COMMON).read_bytes())
    start = content.index(_ENTRY)
    content[start + _SIZES.start : start + _SIZES.stop] = struct.pack("<II", size, size)
    (tmp_path / COMMON).write_bytes(content)
    with pytest.raises(ValueError, match=f"^{COMMON} cannot be read: {reason}"):
        read_optimizer_steps(tmp_path)


def test_any_changed_byte_gives_the_number_or_a_reason(tmp_path: Path) -> None:
    write_common(tmp_path, 7)
    good = (tmp_path / COMMON).read_bytes()
    for place in range(len(good)):
        for value in {0, 1, 255} - {good[place]}:
            (tmp_path / COMMON).write_bytes(good[:place] + bytes([value]) + good[place + 1 :])
            try:
                read_optimizer_steps(tmp_path)
            except ValueError as error:
                assert str(error).startswith(COMMON)
