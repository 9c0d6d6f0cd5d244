"""Pictures by matplotlib, which is optional: `--plot` of some commands."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from jetmoe_megatron.errors import UserError


@contextmanager
def picture(path: Path, dpi: int, rows: int, **options: Any) -> Iterator[tuple[Any, Any]]:
    """pyplot and the axes, one below the other; at the end of the block they are drawn. options: of `pyplot.subplots`.

    Raises:
        UserError: matplotlib is not installed, or the file cannot be written.
    """
    try:
        import matplotlib
    except ImportError:
        raise UserError("drawing needs matplotlib: pip install matplotlib") from None

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(rows, 1, layout="constrained", **options)
    try:
        yield pyplot, axes
        try:
            figure.savefig(path, dpi=dpi)
        except (OSError, ValueError) as error:
            raise UserError(f"{path}: cannot draw there ({error})") from error
    finally:
        pyplot.close(figure)
