"""Colours and words for experts' loads, by their codes (`routers.codes_of`): blue below an even share, red above."""

from __future__ import annotations

from jetmoe_megatron.report.routers import DEAD, LEAST, MOST, NO_NUMBER, load_of

_LOW, _EVEN, _HIGH = (16, 60, 150), (236, 233, 222), (150, 38, 8)
_OF_DEAD, _OF_NO_NUMBER = (214, 0, 147), (128, 128, 128)


def _colour(code: int) -> tuple[int, ...]:
    if code in (DEAD, NO_NUMBER):
        return _OF_DEAD if code == DEAD else _OF_NO_NUMBER
    place = 2 * (code - LEAST) / (MOST - LEAST) - 1  # from -1 to 1
    end, share = (_HIGH if place > 0 else _LOW), abs(place) ** 0.7  # small differences are easier to see
    return tuple(round(even + share * (last - even)) for even, last in zip(_EVEN, end, strict=True))


def _words(code: int) -> str:
    if code in (DEAD, NO_NUMBER):
        return "no assignment at a record" if code == DEAD else "no number"
    return f"load {load_of(code):.3g}{ {LEAST: ' or less', MOST: ' or more'}.get(code, '') }"


PALETTE = [_colour(code) for code in range(256)]
LOADS = [_words(code) for code in range(256)]


def style(code: int) -> str:
    """Of a cell with that ground and a legible text."""
    red, green, blue = PALETTE[code]
    ink = "#111" if 0.3 * red + 0.59 * green + 0.11 * blue > 130 else "#fff"
    return f"background:#{red:02x}{green:02x}{blue:02x};color:{ink}"
